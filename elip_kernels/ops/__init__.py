"""One file per op: the formulas, the reference implementation in PyTorch, and the kernels."""
