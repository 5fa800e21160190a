"""Layers whose weights are stored as sparse tensors, where this makes them faster."""
