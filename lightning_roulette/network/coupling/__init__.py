"""Units of a network: which entries compute each, and which read it."""
