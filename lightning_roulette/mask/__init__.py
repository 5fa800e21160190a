"""Masks: which weights are kept, at one level and at all of them."""
