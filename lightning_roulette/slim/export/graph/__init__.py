"""From `torch.export`'s graph of a network to a program."""
