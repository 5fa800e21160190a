"""The command line: what is read from it and from configurations, and what is run."""
