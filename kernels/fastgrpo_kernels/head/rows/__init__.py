"""Row-wise kernels of the fused LM head that read hidden states or whole rows of logits."""
