"""Log-probability and entropy from hidden states and the LM head, without the logits of all rows at once."""
