"""Packages for Core ML, Apple's runtime, with sparse weights, written by coremltools."""
