"""Scores of pruned networks: the metric, its outcomes for single samples, and the evaluator."""
