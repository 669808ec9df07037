"""The policy losses of GRPO's family, from hidden states and the LM head."""
