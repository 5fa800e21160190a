"""The roulette wheel."""
