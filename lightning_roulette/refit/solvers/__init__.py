"""Solvers: the kept weights of a layer from its Gram sums."""
