"""Evaluators of pruned networks, and the conclusions that their scores allow."""
