"""The search, level by level."""
