"""Networks without the neurons, channels and heads that pruning left without effect."""
