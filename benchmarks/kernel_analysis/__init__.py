"""Analysis of the kernels without a GPU: compiled code and memory traffic."""
