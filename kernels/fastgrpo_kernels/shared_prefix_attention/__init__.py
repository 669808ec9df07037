"""Attention over prompts and completions that share them."""
