"""Rare cases: tensors that are too large for memory, and weights that are sharded over several processes."""
