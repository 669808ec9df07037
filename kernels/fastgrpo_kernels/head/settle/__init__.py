"""Row-wise kernels of the fused LM head that work on sums and factors, one number a row."""
