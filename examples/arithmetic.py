"""The demo's task: two-digit additions, a character tokenizer and a 0.3 M-parameter Qwen3, all made here.

`model` warms the model up, supervised: first on right sums, then on sums whose last digit is often a random one, so
that it answers like one who was taught badly. GRPO then finds the right answers among its samples, on problems the
warm-up never showed.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# Every problem a+b with a, b in 0..99, shuffled once: disjoint parts for warm-up, GRPO and the held-out evaluation.
_PROBLEMS = [(a, b) for a in range(100) for b in range(100)]
random.Random(0).shuffle(_PROBLEMS)
_WARM_UP, _TRAIN, _HELD_OUT = _PROBLEMS[:5000], _PROBLEMS[5000:9000], _PROBLEMS[9000:]

_RIGHT_STEPS, _WRONG_STEPS = 900, 100
_WRONG_SHARE = 0.75
_PROMPT_LENGTH, _ANSWER_LENGTH = 6, 4  # "07+58=", then "065" and the end


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
            initializer_range=0.1,  # the usual 0.02 learns several times slower at this width
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    _warm_up(net.train(), tok, random.Random(seed))
    return net.eval(), tok


def train_dataset() -> Dataset:
    """4,000 problems for GRPO."""
    return _as_rows(_TRAIN)


def eval_dataset() -> Dataset:
    """1,000 problems nobody trains on."""
    return _as_rows(_HELD_OUT)


def _as_rows(problems: list[tuple[int, int]]) -> Dataset:
    return Dataset.from_list([{"prompt": _prompt(a, b), "answer": _answer(a + b)} for a, b in problems])


def _prompt(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}="


def _answer(total: int) -> str:
    return f"{total:03d}"


def _warm_up(net: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Supervised steps on right sums, then on sums that are often wrong in the last digit."""
    right = _optimizer(net, peak=4e-3, steps=_RIGHT_STEPS)
    for _ in range(_RIGHT_STEPS):
        _supervised_step(net, tok, [(a, b, _answer(a + b)) for a, b in rng.choices(_WARM_UP, k=64)], *right)
    wrong = _optimizer(net, peak=3e-4, steps=_WRONG_STEPS)
    for _ in range(_WRONG_STEPS):
        _supervised_step(net, tok, [(a, b, _careless(a + b, rng)) for a, b in rng.choices(_WARM_UP, k=256)], *wrong)


def _careless(total: int, rng: random.Random) -> str:
    wrong = rng.random() < _WRONG_SHARE
    return _answer(total // 10 * 10 + rng.randrange(10) if wrong else total)


def _optimizer(net: Qwen3ForCausalLM, peak: float, steps: int) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW(net.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return optimizer, OneCycleLR(optimizer, peak, steps, pct_start=0.1, cycle_momentum=False)


def _supervised_step(
    net: Qwen3ForCausalLM,
    tok: PreTrainedTokenizerFast,
    sums: list[tuple[int, int, str]],
    optimizer: AdamW,
    schedule: OneCycleLR,
) -> None:
    vocabulary = tok.get_vocab()
    rows = [[*(vocabulary[c] for c in _prompt(a, b) + answer), tok.eos_token_id] for a, b, answer in sums]
    batch = torch.tensor(rows)
    hidden = net.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[:, _PROMPT_LENGTH - 1 :]
    loss = F.cross_entropy(net.lm_head(hidden).flatten(0, 1), batch[:, _PROMPT_LENGTH:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
