"""The model of the update and rollout cases: a Qwen3 of 3.1 M parameters with random weights, and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fastgrpo.policy.attention import register

NAME = "qwen3-3.1m"
VOCABULARY = 4096


def make_model(*, packed: bool) -> Qwen3ForCausalLM:
    """Six layers of width 192, fp32, always the same weights; with this project's attention or transformers' sdpa."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 gives nearly uniform logits at this width: nothing to get wrong
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).float().eval()
    model.set_attn_implementation(register() if packed else "sdpa")
    return model


def make_tokenizer() -> Any:
    """A word per token; its end of sequence is one past the model's vocabulary, so that every completion is full."""
    words = {str(i): i for i in range(VOCABULARY)} | {"<eos>": VOCABULARY}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="<eos>"
    )
