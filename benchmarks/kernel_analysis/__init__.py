"""Analysis of the kernels without a GPU: compiled code, memory traffic, waits."""
