"""The LM head's GEMM with the exponential in its epilogue: logits never leave registers."""
