"""C source of a network, with no other dependency than the standard headers."""
