"""A tokenizer and a model small enough for every test, built here: nothing is downloaded.

Tests get at this file by the fixture `helpers` (tests are not a package).
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>", "<unk>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A token for each printable ASCII character (105 tokens); text starts with <bos>, turns end with <|im_end|>."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def make_model(vocab_size: int = 105, *, tie_word_embeddings: bool = True, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of about 20,000 parameters in fp32: 2 layers, 4 heads of 8 over 2 key-value heads, width 32."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<|im_end|>"),
        initializer_range=0.2,  # the default gives nearly uniform logits at this width: nothing to tell apart
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def save_model_dir(folder: Path, *, tie_word_embeddings: bool = True, seed: int = 0) -> Path:
    """`folder` as a Hugging Face model folder with model and tokenizer."""
    make_model(tie_word_embeddings=tie_word_embeddings, seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
