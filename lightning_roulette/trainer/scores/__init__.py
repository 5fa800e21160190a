"""Scores of pruned networks: which metric, on which data, for which samples."""
