"""Files for ExecuTorch, the runtime of PyTorch for phones, through XNNPACK."""
