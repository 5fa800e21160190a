"""Refits a pruned network on inputs, without training or labels."""
