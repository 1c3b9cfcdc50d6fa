"""One file for each op: its mathematics, its specification in PyTorch, its kernels."""
