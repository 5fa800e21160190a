"""What a user sees of a search: log lines, a line in the progress bar, curves. Each is a `Display`."""
