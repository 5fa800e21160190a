"""Survivors solved on inputs, without training."""
