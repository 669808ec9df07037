"""The LM head with gradients, the head trainable: the chunked ops against full logits and against others' heads.

linear_grpo_loss: the clipped loss of every token.
linear_logprob:   the mean negative log-prob alone, which is all that torch's own op can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import log
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, OURS, Case, clipped_loss, relative_error
from benchmarks.heads import HEADS, NEEDS, Head, liger_loss, torch_loss
from fastgrpo_kernels import linear_grpo_loss, linear_logprob

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LENGTH = 128
"""Tokens of every sequence."""


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

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target


def make_inputs(seed: int, N: int, D: int, V: int) -> Inputs:
    """Logits are standard normal; the ratios stand both inside the clip range and outside."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    normal = partial(torch.randn, generator=g, device=DEVICE)
    hidden, weight = normal(N, D).to(DTYPE), (normal(V, D) / D**0.5).to(DTYPE)
    target = torch.randint(V, (N,), generator=g, device=DEVICE)
    # The log-sum-exp of V standard normal logits is log V + |h|^2 / 2D but for a per cent: no GEMM needed to know it.
    of_target = torch.cat([(hidden[i].float() * weight[target[i]]).sum(1) for i in torch.arange(N).split(2048)])
    logprob = of_target - log(V) - hidden.float().square().sum(1) / (2 * D)
    return Inputs(
        seed=seed,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        target=target,
        advantage=normal(N // LENGTH).repeat_interleave(LENGTH),
        old_logprob=logprob + 0.2 * normal(N),
        cu_seqlens=torch.arange(0, N + 1, LENGTH, dtype=torch.int32, device=DEVICE),
    )


def fused(x: Inputs) -> Tensor:
    """The op; it also computes entropies and metrics."""
    output = linear_grpo_loss(*x.head, x.advantage, x.cu_seqlens, old_logprob=x.old_logprob, num_tokens=len(x.target))
    output.loss.backward()
    return output.loss.detach()


def by_head(x: Inputs, head: Head) -> Tensor:
    """The loss written on somebody's log-probs."""
    loss = clipped_loss(head(*x.head), x.old_logprob, x.advantage) / len(x.target)
    loss.backward()
    return loss.detach()


def liger(x: Inputs) -> Tensor:
    loss = liger_loss(*x.head, x.advantage, x.old_logprob, LENGTH)
    loss.backward()
    return loss.detach()


def mean_by_head(x: Inputs, head: Head) -> Tensor:
    loss = -head(*x.head).mean()
    loss.backward()
    return loss.detach()


def mean_by_torch(x: Inputs) -> Tensor:
    loss = torch_loss(*x.head)
    loss.backward()
    return loss.detach()


def logprob_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, entropy_gradient=False)[0]


def errors(x: Inputs, loss: Tensor, policy: bool = True) -> dict[str, float]:
    true_loss, true_hidden, true_weight = truth(x.seed, *x.hidden.shape, len(x.weight), policy)
    assert x.hidden.grad is not None
    assert x.weight.grad is not None
    return {
        "loss": relative_error(loss, true_loss),
        "grad_hidden": relative_error(x.hidden.grad, true_hidden),
        "grad_weight": relative_error(x.weight.grad, true_weight),
    }


@lru_cache(maxsize=1)  # a size's peers follow one another, and the gradients are large
def truth(seed: int, N: int, D: int, V: int, policy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, by autograd, some rows at a time; without `policy`, of the mean log-prob."""
    x = make_inputs(seed, N, D, V)
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for rows in torch.arange(N, device=DEVICE).split(LENGTH):
        logprob = torch.log_softmax(hidden[rows] @ weight.T, -1).gather(1, x.target[rows, None]).squeeze(1)
        old, advantage = x.old_logprob[rows].double(), x.advantage[rows].double()
        part = (clipped_loss(logprob, old, advantage) if policy else -logprob.sum()) / N
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total, hidden.grad, weight.grad


_POLICY: dict[str, Callable[[Inputs], Tensor]] = {name: partial(by_head, head=head) for name, head in HEADS.items()}
_POLICY |= {"liger": liger, OURS: fused}
_MEAN: dict[str, Callable[[Inputs], Tensor]] = {name: partial(mean_by_head, head=head) for name, head in HEADS.items()}
_MEAN |= {"torch": mean_by_torch, OURS: partial(mean_by_head, head=logprob_head)}


def _cases(op: str, size: dict[str, int], peers: dict[str, Callable[[Inputs], Tensor]], rounds: int) -> list[Case]:
    """A row per peer. No way has fewer than three GEMMs, or reads operands and writes gradients less than once."""
    N, D, V = size["N"], size["D"], size["V"]
    tolerance = dict.fromkeys(("loss", "grad_hidden", "grad_weight"), 5e-2)  # bf16: some peers round logits to it
    if not ON_GPU:
        tolerance = {"loss": 1e-5, "grad_hidden": 1e-4, "grad_weight": 1e-4}
    found: Any = partial(errors, policy=peers is not _MEAN)
    return [
        Case(
            op=op,
            peer=peer,
            params=dict(size),
            tokens=N,
            inputs=partial(make_inputs, **size),
            run=run,
            errors=found,
            tolerance=tolerance,
            rounds=min(rounds, 2) if peer in ("trl", "torch") and not ON_GPU else rounds,  # several times as slow
            needs=NEEDS.get(peer),
            flops=6.0 * N * D * V,
            moved=2.0 * DTYPE.itemsize * (N * D + V * D),
        )
        for peer, run in peers.items()
    ]


def policy_cases(op: str, size: dict[str, int], rounds: int) -> list[Case]:
    """The clipped loss by all peers that have one."""
    return _cases(op, size, _POLICY, rounds)


def mean_cases(op: str, size: dict[str, int], rounds: int) -> list[Case]:
    """The mean log-prob."""
    return _cases(op, size, _MEAN, rounds)


def _sizes(D: int, base: tuple[int, int], Ns: tuple[int, ...], Vs: tuple[int, ...]) -> list[dict[str, int]]:
    """Along N and along V through the base."""
    N, V = base
    return [{"N": n, "D": D, "V": V} for n in Ns] + [{"N": N, "D": D, "V": v} for v in Vs]


if ON_GPU:
    _ALONG = _sizes(2048, (16384, 151936), (4096, 8192, 16384, 32768), (32000, 65536, 128256))
    _MEANS, _LARGE, _ROUNDS = _ALONG[2:3], [], 9
else:
    _ALONG = _sizes(128, (256, 32768), (256, 1024), (8192, 151936))
    # The large one is the row that the op promises on two threads: at most 0.95 x naive's time and 0.10 x its memory.
    _MEANS = [{"N": 512, "D": 128, "V": 32768}]
    _LARGE, _ROUNDS = [*_MEANS, {"N": 4096, "D": 256, "V": 50257}], 5

CASES = [case for size in _ALONG for case in policy_cases("linear_grpo_loss", size, _ROUNDS)]
CASES += [case for size in _MEANS for case in mean_cases("linear_logprob", size, _ROUNDS)]
MORE = [case for size in _LARGE for case in policy_cases("linear_grpo_loss", size, _ROUNDS)]


def test_head(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
