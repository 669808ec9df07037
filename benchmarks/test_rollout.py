"""Sampling groups of completions: the plain loop against transformers' generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.cases import OURS, Case
from benchmarks.small_model import NAME, VOCABULARY, make_model, make_tokenizer
from fastgrpo.records import Prompt, Sampling
from fastgrpo.rollout.loop import LoopEngine

_PROMPTS, _GENERATIONS, _MAX_TOKENS = 16, 8, 32


@dataclass(frozen=True)
class Inputs:
    """Prompts of different lengths, and the sampler's seed."""

    prompts: list[Prompt]
    seed: int


@dataclass(frozen=True)
class Result:
    """Completions [16 * 8, 32], a prompt's together; the log-probs of their tokens where the peer gives them."""

    tokens: Tensor
    logprob: Tensor | None


def make_inputs(seed: int) -> Inputs:
    """Random prompts of 8 to 23 tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (8 + i,), generator=g).tolist() for i in range(_PROMPTS)]
    _engine(), _generator()  # made here, where no clock runs
    return Inputs([Prompt(i, "", tokens) for i, tokens in enumerate(ids)], seed)


@cache
def _engine() -> LoopEngine:
    return LoopEngine(make_model(packed=True), make_tokenizer())


@cache
def _generator() -> torch.nn.Module:
    return make_model(packed=False)


def loop(x: Inputs) -> Result:
    """The engine; it also gives log-probs and decodes the text."""
    made = _engine().generate(x.prompts, _GENERATIONS, Sampling(_MAX_TOKENS, seed=x.seed))
    return Result(torch.tensor([r.token_ids for r in made]), torch.stack([r.sampling_logprob for r in made]))


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
        max_new_tokens=_MAX_TOKENS,
        num_return_sequences=_GENERATIONS,
        pad_token_id=0,
    )
    torch.manual_seed(x.seed)
    tokens = _generator().generate(ids, attention_mask=mask, generation_config=options)  # type: ignore[operator]
    return Result(tokens[:, longest:], None)


@torch.no_grad()
def errors(x: Inputs, result: Result) -> dict[str, float]:
    """Against transformers' full forward, a group at a time, without padding or cache.

    surprise: the sampled tokens' mean log-prob against minus the mean entropy, which it must be when tokens are drawn
    from the model's distribution, in standard errors.
    """
    assert result.tokens.shape == (_PROMPTS * _GENERATIONS, _MAX_TOKENS)
    logprob, entropy = [], []
    for prompt, tokens in zip(x.prompts, result.tokens.split(_GENERATIONS), strict=True):
        ids = torch.cat([torch.tensor(prompt.token_ids).expand(_GENERATIONS, -1), tokens], 1)
        logits = _generator()(input_ids=ids, use_cache=False).logits[:, -_MAX_TOKENS - 1 : -1]
        distribution = torch.log_softmax(logits.double(), -1)
        logprob.append(distribution.gather(2, tokens[:, :, None]).squeeze(2))
        entropy.append(-(distribution.exp() * distribution).sum(2))
    expected = torch.cat(logprob)
    excess = expected + torch.cat(entropy)
    found = {"surprise": (excess.mean().abs() / excess.std() * excess.numel() ** 0.5).item()}
    if result.logprob is not None:
        found["logprob"] = (result.logprob - expected).abs().max().item()
    return found


_PEERS = {"transformers": generate, OURS: loop}
CASES = [
    Case(
        op="rollout",
        peer=peer,
        params={"model": NAME, "prompts": _PROMPTS, "n": _GENERATIONS, "max_tokens": _MAX_TOKENS},
        tokens=_PROMPTS * _GENERATIONS * _MAX_TOKENS,
        inputs=make_inputs,
        run=run,
        errors=errors,
        tolerance={"surprise": 4.0, "logprob": 1e-4},
    )
    for peer, run in _PEERS.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rollout(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
