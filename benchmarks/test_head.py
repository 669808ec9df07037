"""LM head and policy loss with gradients, the head trainable: the chunked op against full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import OURS, Case, clipped_loss, relative_error
from fastgrpo_kernels import linear_grpo_loss

_LENGTH = 128  # tokens of every sequence


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D] and weight [V, D] want gradients; target, advantage, old_logprob [N]; advantage per token."""

    seed: int
    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor
    old_logprob: Tensor
    cu_seqlens: Tensor


def make_inputs(seed: int, N: int, D: int, V: int) -> Inputs:
    """Logits are standard normal; the ratios stand both inside the clip range and outside."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) / D**0.5
    target = torch.randint(V, (N,), generator=g)
    # The log-sum-exp of V standard normal logits is log V + |h|^2 / 2D but for a per cent: no GEMM needed to know it.
    logprob = (hidden * weight[target]).sum(1) - log(V) - hidden.square().sum(1) / (2 * D)
    return Inputs(
        seed=seed,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        target=target,
        advantage=torch.randn(N // _LENGTH, generator=g).repeat_interleave(_LENGTH),
        old_logprob=logprob + 0.2 * torch.randn(N, generator=g),
        cu_seqlens=torch.arange(0, N + 1, _LENGTH, dtype=torch.int32),
    )


def fused(x: Inputs) -> Tensor:
    """The op; it also computes entropies and metrics."""
    output = linear_grpo_loss(
        x.hidden, x.weight, x.target, x.advantage, x.cu_seqlens, old_logprob=x.old_logprob, num_tokens=len(x.target)
    )
    output.loss.backward()
    return output.loss.detach()


def naive(x: Inputs) -> Tensor:
    """Full logits in fp32; no name holds on to a tensor of [N, V], so autograd may free what it does not need."""
    logprob = torch.log_softmax(F.linear(x.hidden, x.weight).float(), -1).gather(1, x.target[:, None]).squeeze(1)
    loss = clipped_loss(logprob, x.old_logprob, x.advantage) / len(x.target)
    loss.backward()
    return loss.detach()


def errors(x: Inputs, loss: Tensor) -> dict[str, float]:
    true_loss, true_hidden, true_weight = truth(x.seed, *x.hidden.shape, len(x.weight))
    assert x.hidden.grad is not None
    assert x.weight.grad is not None
    return {
        "loss": relative_error(loss, true_loss),
        "grad_hidden": relative_error(x.hidden.grad, true_hidden),
        "grad_weight": relative_error(x.weight.grad, true_weight),
    }


@cache
def truth(seed: int, N: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, by autograd, some rows at a time."""
    x = make_inputs(seed, N, D, V)
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(N).split(_LENGTH):
        logprob = torch.log_softmax(hidden[rows] @ weight.T, -1).gather(1, x.target[rows, None]).squeeze(1)
        part = clipped_loss(logprob, x.old_logprob[rows].double(), x.advantage[rows].double()) / N
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total, hidden.grad, weight.grad


def trl(x: Inputs) -> Tensor:
    """The chunked head of TRL 1.16 as its trainer calls it: tiles of 32,768 columns, the entropy beside."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",)
    logprob = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.target, 1.0, 32768, None, 1.0, outputs)[0]
    loss = clipped_loss(logprob, x.old_logprob, x.advantage) / len(x.target)
    loss.backward()
    return loss.detach()


# The second is the row that the ops promise on two threads: at most 0.95 x naive's time and 0.10 x its memory.
_SIZES = [{"N": 1024, "D": 256, "V": 50257}, {"N": 4096, "D": 256, "V": 50257}]
_PEERS: dict[str, Callable[[Inputs], Tensor]] = {"naive": naive, "trl": trl, OURS: fused}
CASES = [
    Case(
        op="linear_grpo_loss",
        peer=peer,
        params=size,
        tokens=size["N"],
        inputs=partial(make_inputs, **size),
        run=run,
        errors=errors,
        tolerance={"loss": 1e-5, "grad_hidden": 1e-4, "grad_weight": 1e-4},
        rounds=1 if peer == "trl" else 5,
    )
    for size in _SIZES
    for peer, run in _PEERS.items()
    if peer != "trl" or find_spec("trl")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_head(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
