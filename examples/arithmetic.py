"""The demo's task: two-digit additions, a character tokenizer and a 0.3 M-parameter Qwen3, all made here.

`model` warms the model up, supervised: first on right sums, then on sums of which more than half are wrong, so that it
answers like one who was taught badly. GRPO then finds the right answers among its samples, on problems the warm-up
never showed.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# Every problem a+b with a, b in 0..99, shuffled once: disjoint parts for warm-up, GRPO and the held-out evaluation.
_PROBLEMS = [(a, b) for a in range(100) for b in range(100)]
random.Random(0).shuffle(_PROBLEMS)
_WARM_UP, _TRAIN, _HELD_OUT = _PROBLEMS[:5000], _PROBLEMS[5000:9000], _PROBLEMS[9000:]

_RIGHT_STEPS, _WRONG_STEPS = 900, 60
_RIGHT_SHARE = 0.4
_BATCH = 64
_PROMPT_LENGTH, _ANSWER_LENGTH = 6, 4  # "07+58=", up to three digits and the end


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The warm-started policy and its tokenizer; the same for a seed."""
    tok = tokenizer()
    torch.manual_seed(seed)
    net = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    _warm_up(net, tok, random.Random(seed))
    return net, tok


def train_dataset() -> Dataset:
    """4,000 problems for GRPO."""
    return _as_rows(_TRAIN)


def eval_dataset() -> Dataset:
    """1,000 problems nobody trains on."""
    return _as_rows(_HELD_OUT)


def _prompt(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}="


def _as_rows(problems: list[tuple[int, int]]) -> Dataset:
    return Dataset.from_list([{"prompt": _prompt(a, b), "answer": str(a + b)} for a, b in problems])


def _warm_up(net: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Supervised steps on right sums, then on sums of which only `_RIGHT_SHARE` are right."""
    vocabulary = tok.get_vocab()
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, _RIGHT_STEPS, pct_start=0.1)
    net.train()
    for step in range(_RIGHT_STEPS + _WRONG_STEPS):
        right = step < _RIGHT_STEPS
        rows = []
        for a, b in rng.choices(_WARM_UP, k=_BATCH):
            answer = a + b
            if not right and rng.random() >= _RIGHT_SHARE:
                answer = max(0, answer + rng.choice([-20, -10, -2, -1, 1, 2, 10, 20]))
            ids = [*(vocabulary[c] for c in f"{_prompt(a, b)}{answer}"), tok.eos_token_id]
            rows.append(ids + [tok.pad_token_id] * (_PROMPT_LENGTH + _ANSWER_LENGTH - len(ids)))
        batch = torch.tensor(rows)
        hidden = net.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[:, _PROMPT_LENGTH - 1 :]
        target = batch[:, _PROMPT_LENGTH:]
        loss = F.cross_entropy(net.lm_head(hidden).flatten(0, 1), target.flatten(), ignore_index=tok.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if right:
            schedule.step()
        else:
            optimizer.param_groups[0]["lr"] = 1e-3
    net.eval()
