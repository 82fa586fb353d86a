"""Device code. Kernels take tables of addresses instead of tensors, and are specialised on the layout of the rows."""
