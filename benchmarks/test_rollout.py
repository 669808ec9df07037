"""Sampling groups of completions: the loop engine against transformers' generate.

Two jobs: completions that all run to the limit, and completions that end by themselves, their lengths lognormal.
MORE holds the full sizes: `python -m benchmarks.cases benchmarks.test_rollout --rounds 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import log
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.cases import OURS, Case
from benchmarks.small_model import NAME, VOCABULARY, make_model, make_tokenizer
from fastgrpo.records import Prompt, Sampling
from fastgrpo.rollout.loop import LoopEngine

_GENERATIONS = 8
_PROMPT = 24  # tokens of the longest prompt
_END = 1  # the token that ends a completion in the model that has one
_CHECKED = 16  # prompts whose completions are compared with full forwards


@dataclass(frozen=True)
class Inputs:
    """Prompts of different lengths, the sampler's seed, the limit, and whether completions end before it."""

    prompts: list[Prompt]
    seed: int
    max_tokens: int
    ends: bool


@dataclass(frozen=True)
class Result:
    """Completions, a prompt's together; the log-probs of their tokens where the peer gives them."""

    tokens: list[list[int]]
    logprob: list[Tensor] | None


def make_inputs(seed: int, prompts: int, max_tokens: int, ends: bool) -> Inputs:
    """Random prompts of 9 to 24 tokens; all of 24 where completions end by their position."""
    g = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(2, VOCABULARY, (_PROMPT if ends else _PROMPT - i % 16,), generator=g).tolist()
        for i in range(prompts)
    ]
    _engine(ends), _generator(ends)  # made here, where no clock runs
    return Inputs([Prompt(i, "", tokens) for i, tokens in enumerate(ids)], seed, max_tokens, ends)


class _Ending(torch.nn.Module):
    """The model's head, whose end token is as likely at each position as lognormal lengths ask, of mean 64."""

    def __init__(self, model: torch.nn.Module, mean: float = 64.0, sigma: float = 1.0) -> None:
        super().__init__()
        self.head = model.lm_head
        normal = NormalDist(log(mean) - sigma**2 / 2, sigma)
        share = [0.0, *(normal.cdf(log(n)) for n in range(1, 600))]  # of completions no longer than n
        hazard = [(b - a) / (1 - a) for a, b in pairwise(share)]
        # By the number of the token; the others' log-sum-exp hardly varies in a model of random weights.
        rest = log(VOCABULARY) + 0.24
        self.logit = torch.tensor([rest + log(h / (1 - h)) if h > 1e-12 else -60.0 for h in hazard])
        self.position = torch.zeros(1, 1, dtype=torch.int64)
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def _note(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep, position = kwargs.get("logits_to_keep", 0), kwargs.get("position_ids")
        if position is None:
            position = torch.arange(kwargs["input_ids"].shape[1])[None]
        self.position = position[:, slice(-keep, None) if isinstance(keep, int) else keep]

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        logits[..., _END] = self.logit[(self.position + 1 - _PROMPT).clamp(0, len(self.logit) - 1)]
        return logits


def _model(packed: bool, ends: bool) -> Any:
    model: Any = make_model(packed=packed)
    if ends:
        model.lm_head = _Ending(model)
    return model


@cache
def _engine(ends: bool) -> LoopEngine:
    tokenizer = make_tokenizer(eos_token=str(_END)) if ends else make_tokenizer()
    return LoopEngine(_model(True, ends), tokenizer)


@cache
def _generator(ends: bool) -> Any:
    return _model(False, ends)


def loop(x: Inputs) -> Result:
    """The engine; it also gives log-probs and decodes the text."""
    made = _engine(x.ends).generate(x.prompts, _GENERATIONS, Sampling(x.max_tokens, seed=x.seed))
    return Result([r.token_ids for r in made], [r.sampling_logprob for r in made])


def generate(x: Inputs) -> Result:
    """Token ids alone. Prompts padded on the left; top_k and top_p off, so that it samples from the model itself."""
    longest = max(len(p.token_ids) for p in x.prompts)
    padding = [longest - len(p.token_ids) for p in x.prompts]
    ids = torch.tensor([[0] * n + p.token_ids for n, p in zip(padding, x.prompts, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    options = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=x.max_tokens,
        num_return_sequences=_GENERATIONS,
        pad_token_id=0,
        eos_token_id=_END if x.ends else None,
    )
    torch.manual_seed(x.seed)
    tokens = _generator(x.ends).generate(ids, attention_mask=mask, generation_config=options)[:, longest:].tolist()
    return Result([row[: row.index(_END) + 1] if x.ends and _END in row else row for row in tokens], None)


@torch.no_grad()
def errors(x: Inputs, result: Result) -> dict[str, float]:
    """Against transformers' full forward of each completion alone, without padding or cache.

    surprise: the sampled tokens' mean log-prob against minus the mean entropy, which it must be when tokens are drawn
    from the model's distribution, in standard errors.
    """
    assert len(result.tokens) == len(x.prompts) * _GENERATIONS
    assert all(len(t) == x.max_tokens or (x.ends and t[-1] == _END) for t in result.tokens)
    excess, found = [], {"logprob": 0.0}
    for i, tokens in enumerate(result.tokens[: _CHECKED * _GENERATIONS]):
        ids = torch.tensor([x.prompts[i // _GENERATIONS].token_ids + tokens])
        logits = _generator(x.ends)(input_ids=ids, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        distribution = torch.log_softmax(logits.double(), -1)
        logprob = distribution.gather(1, ids[0, -len(tokens) :, None]).squeeze(1)
        excess.append(logprob - (distribution.exp() * distribution).sum(1))
        if result.logprob is not None:
            found["logprob"] = max(found["logprob"], (result.logprob[i] - logprob).abs().max().item())
    every = torch.cat(excess)
    return found | {"surprise": (every.mean().abs() / every.std() * every.numel() ** 0.5).item()}


@dataclass(frozen=True)
class _Job:
    """`inputs` of a case."""

    prompts: int
    max_tokens: int
    ends: bool

    def __call__(self, seed: int) -> Inputs:
        return make_inputs(seed, self.prompts, self.max_tokens, self.ends)


_PEERS = {"transformers": generate, OURS: loop}


def _cases(prompts: int, max_tokens: int, ends: bool, rounds: int) -> list[Case]:
    lengths = "lognormal" if ends else "full"
    mean = 64 if ends else max_tokens
    return [
        Case(
            op="rollout",
            peer=peer,
            params={
                "model": NAME,
                "prompts": prompts,
                "n": _GENERATIONS,
                "max_tokens": max_tokens,
                "lengths": lengths,
            },
            tokens=prompts * _GENERATIONS * mean,
            inputs=_Job(prompts, max_tokens, ends),
            run=run,
            errors=errors,
            tolerance={"surprise": 4.0, "logprob": 1e-5},
            rounds=rounds,
        )
        for peer, run in _PEERS.items()
    ]


CASES = _cases(16, 32, ends=False, rounds=3)
MORE = _cases(64, 32, ends=False, rounds=5) + _cases(64, 512, ends=True, rounds=1)


def test_rollout(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
