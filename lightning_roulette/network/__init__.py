"""The network that is pruned: its parameters, layers, samples, and how its weights are lent."""
