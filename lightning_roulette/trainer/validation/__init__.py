"""Validation of a network that is lent: loggers, callbacks and random state are left untouched."""
