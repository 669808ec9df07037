"""The policy losses of GRPO's family, from log-probabilities."""
