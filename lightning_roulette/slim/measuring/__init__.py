"""What zeros save in a network: bytes, multiply-adds and time."""
