"""What a slim network saves: bytes of a file, and flash and memory of a device."""
