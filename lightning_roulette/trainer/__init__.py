"""The shell around a Lightning Trainer: when to search, how candidates are validated, where results go."""
