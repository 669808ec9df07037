"""Ops that read logits [N, V]: log-probs and entropies with their gradient, and sampling.

token_logprob: log-probs and entropies, backward from the log-probs.
sample_tokens: one token a row and its log-prob, temperature 1, no filters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, OURS, Case, relative_error
from fastgrpo_kernels import sample_tokens, token_logprob

_ON_GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Inputs:
    """logits [N, V] in fp32; target, upstream, uniform [N]: uniform is in [0, 1)."""

    logits: Tensor
    target: Tensor
    upstream: Tensor
    uniform: Tensor


def make_inputs(seed: int, N: int, V: int) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(seed)
    torch.manual_seed(seed)  # for those who draw from the global generator
    logits, upstream = (torch.randn(*shape, generator=g, device=DEVICE) for shape in ((N, V), (N,)))
    target = torch.randint(V, (N,), generator=g, device=DEVICE)
    return Inputs(logits.requires_grad_(), target, upstream, torch.rand(N, generator=g, device=DEVICE))


def plain_logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.log_softmax(logits, -1)
    return every.gather(1, target[:, None]).squeeze(1), -(every.exp() * every).sum(-1)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(plain_logprob, dynamic=True)


def compiled_logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _compiled()(logits, target)


def logprobs(x: Inputs, op: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    logprob, entropy = op(x.logits, x.target)
    logprob.backward(x.upstream)
    return logprob.detach(), entropy.detach()


def logprob_errors(x: Inputs, found: tuple[Tensor, Tensor]) -> dict[str, float]:
    logits = x.logits.detach().double().requires_grad_()
    logprob, entropy = plain_logprob(logits, x.target)
    logprob.backward(x.upstream.double())
    assert x.logits.grad is not None
    assert logits.grad is not None
    return {
        "logprob": relative_error(found[0], logprob.detach()),
        "entropy": relative_error(found[1], entropy.detach()),
        "grad_logits": relative_error(x.logits.grad, logits.grad),
    }


@torch.no_grad()
def naive_sample(x: Inputs) -> tuple[Tensor, Tensor]:
    """As transformers' generate draws, and the log-prob that an RL trainer needs beside."""
    every = torch.log_softmax(x.logits, -1)
    token = torch.multinomial(every.exp(), 1)
    return token.squeeze(1), every.gather(1, token).squeeze(1)


@torch.no_grad()
def fused_sample(x: Inputs) -> tuple[Tensor, Tensor]:
    return sample_tokens(x.logits, x.uniform)


@torch.no_grad()
def sample_errors(x: Inputs, found: tuple[Tensor, Tensor]) -> dict[str, float]:
    """surprise: the mean log-prob against minus the mean entropy, in standard errors, as it must be of true samples."""
    token, logprob = found
    true, entropy = plain_logprob(x.logits.double(), token)
    excess = true + entropy
    surprise = excess.mean().abs() / excess.std() * len(token) ** 0.5
    return {"logprob": relative_error(logprob, true), "surprise": surprise.item()}


def cases(N: int, V: int) -> list[Case]:
    """The gradient cannot be made without reading the logits again; a sample needs them once."""
    matrix = 4.0 * N * V
    size: dict[str, Any] = {"params": {"N": N, "V": V}, "tokens": N, "inputs": partial(make_inputs, N=N, V=V)}
    logprob = {"naive": plain_logprob, "torch_compile": compiled_logprob, OURS: token_logprob}
    exact = dict.fromkeys(("logprob", "entropy", "grad_logits"), 1e-5)
    return [
        Case("token_logprob", p, run=partial(logprobs, op=op), errors=logprob_errors, tolerance=exact, rounds=5,
             moved=3 * matrix, **size)
        for p, op in logprob.items()
    ] + [
        Case("sample_tokens", p, run=run, errors=sample_errors, tolerance={"logprob": 1e-5, "surprise": 4.0}, rounds=5,
             moved=matrix, **size)
        for p, run in (("naive", naive_sample), (OURS, fused_sample))
    ]  # fmt: skip


_SIZES = [(4096, 32000), (4096, 151936)] if _ON_GPU else [(128, 8192), (128, 50257), (512, 50257)]
CASES = [case for N, V in _SIZES for case in cases(N, V)]


def test_logits(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
