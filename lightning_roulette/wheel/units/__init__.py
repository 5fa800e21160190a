"""Units: weights that leave a network together."""
