"""What scores pruned networks, and what may be concluded from the scores."""
