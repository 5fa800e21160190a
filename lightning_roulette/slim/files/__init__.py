"""Small files: weights and positions of survivors, entropy-coded, and what a file of weights holds."""
