"""From a trained network to a program of few operations, and from it to files that devices run."""
