"""Frozen records of a search."""
