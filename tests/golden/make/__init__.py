"""Scripts that made the golden tensors. Each takes the path of an official checkout."""
