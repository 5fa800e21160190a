"""What people see of a search: log lines, the progress bar, curves."""
