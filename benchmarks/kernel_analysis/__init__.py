"""What the kernels cost, without a GPU: compiled code, bytes moved, waits, predicted time."""
