"""Ops on vectors: the policy loss from log-probs, group-normalised advantages, GAE; S sequences of equal length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, OURS, Case, clipped_loss, relative_error
from fastgrpo_kernels import gae, group_advantages, grpo_loss

_GROUP = 8  # completions of a prompt
_GAMMA, _LAMBDA = 0.99, 0.95


@dataclass(frozen=True)
class Inputs:
    """logprob [N] wants a gradient; old_logprob, rewards, values [N]; score, group, advantage [S]."""

    logprob: Tensor
    old_logprob: Tensor
    rewards: Tensor
    values: Tensor
    score: Tensor
    group: Tensor
    advantage: Tensor
    cu_seqlens: Tensor


def make_inputs(seed: int, S: int, N: int) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(seed)
    normal = partial(torch.randn, generator=g, device=DEVICE)
    logprob = -normal(N).abs()
    return Inputs(
        logprob=logprob.clone().requires_grad_(),
        old_logprob=logprob + 0.2 * normal(N),
        rewards=normal(N),
        values=normal(N),
        score=normal(S),
        group=torch.arange(S, device=DEVICE) // _GROUP,
        advantage=normal(S),
        cu_seqlens=torch.arange(0, N + 1, N // S, dtype=torch.int32, device=DEVICE),
    )


def fused_loss(x: Inputs) -> Tensor:
    """It also computes the metrics: KL, clip fractions, ..."""
    loss = grpo_loss(x.logprob, x.advantage, x.cu_seqlens, old_logprob=x.old_logprob, num_tokens=len(x.logprob)).loss
    loss.backward()
    return loss.detach()


def _by_token(x: Inputs) -> Tensor:
    return x.advantage.repeat_interleave(len(x.logprob) // len(x.advantage))


def naive_loss(x: Inputs, op: Callable[..., Tensor] = clipped_loss) -> Tensor:
    loss = op(x.logprob, x.old_logprob, _by_token(x)) / len(x.logprob)
    loss.backward()
    return loss.detach()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(clipped_loss, dynamic=True)


def compiled_loss(x: Inputs) -> Tensor:
    return naive_loss(x, _compiled())


def loss_errors(x: Inputs, loss: Tensor) -> dict[str, float]:
    logprob = x.logprob.detach().double().requires_grad_()
    true = clipped_loss(logprob, x.old_logprob.double(), _by_token(x).double()) / len(logprob)
    true.backward()
    assert x.logprob.grad is not None
    assert logprob.grad is not None
    return {"loss": relative_error(loss, true.detach()), "grad": relative_error(x.logprob.grad, logprob.grad)}


def fused_advantages(x: Inputs) -> Tensor:
    return group_advantages(x.score, x.group)


def naive_advantages(x: Inputs) -> Tensor:
    """As TRL has it: groups of equal size, in order."""
    groups = x.score.view(-1, _GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def advantage_errors(x: Inputs, advantage: Tensor) -> dict[str, float]:
    true = [(s - s.mean()) / (s.std() + 1e-4) for s in x.score.double().split(_GROUP)]
    return {"advantage": relative_error(advantage, torch.cat(true))}


def fused_gae(x: Inputs) -> Tensor:
    return gae(x.rewards, x.values, x.cu_seqlens, gamma=_GAMMA, lam=_LAMBDA)[0]


def naive_gae(x: Inputs) -> Tensor:
    """A loop over time, all sequences beside one another; here they need no padding."""
    rewards, values = (t.view(len(x.score), -1).T for t in (x.rewards, x.values))
    advantage, following, found = torch.zeros_like(rewards[0]), torch.zeros_like(values[0]), []
    for reward, value in zip(reversed(rewards.unbind()), reversed(values.unbind()), strict=True):
        advantage = reward + _GAMMA * following - value + _GAMMA * _LAMBDA * advantage
        following = value
        found.append(advantage)
    return torch.stack(found[::-1], 1).view(-1)


def gae_errors(x: Inputs, advantage: Tensor) -> dict[str, float]:
    """Against the definition: sums of discounted temporal differences."""
    rewards, values = (t.double().view(len(x.score), -1) for t in (x.rewards, x.values))
    delta = rewards + _GAMMA * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    steps = torch.arange(delta.shape[1], device=DEVICE)
    apart = (steps[:, None] - steps[None]).double()
    weights = torch.where(apart >= 0, (_GAMMA * _LAMBDA) ** apart, 0.0)
    return {"advantage": relative_error(advantage, (delta @ weights).view(-1))}


def cases(S: int, N: int) -> list[Case]:
    size: dict[str, Any] = {"params": {"S": S, "N": N}, "tokens": N, "inputs": partial(make_inputs, S=S, N=N)}
    ops: dict[str, tuple[Any, dict[str, Callable[[Inputs], Tensor]]]] = {
        "grpo_loss": (loss_errors, {"naive": naive_loss, "torch_compile": compiled_loss, OURS: fused_loss}),
        "group_advantages": (advantage_errors, {"naive": naive_advantages, OURS: fused_advantages}),
        "gae": (gae_errors, {"naive": naive_gae, OURS: fused_gae}),
    }
    return [
        Case(op, peer, run=run, errors=errors, tolerance=dict.fromkeys(("loss", "grad", "advantage"), 1e-4), rounds=31,
             weighed=DEVICE.type == "cuda", **size)  # resident pages are too coarse for a few vectors
        for op, (errors, peers) in ops.items() for peer, run in peers.items()
    ]  # fmt: skip


CASES = cases(1024, 1 << 20) if DEVICE.type == "cuda" else cases(128, 1 << 15)


def test_small_ops(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
