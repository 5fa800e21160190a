"""Rare cases: tensors too large for memory, and weights that lie in several processes."""
