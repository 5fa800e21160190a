"""Validation of pruned networks within a fit: loggers, callbacks and random state are left untouched."""
