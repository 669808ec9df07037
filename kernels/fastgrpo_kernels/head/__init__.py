"""The LM head fused with the loss: GEMMs with epilogues, and passes over rows."""
