"""What a shared prompt saves where it is shared, and what it costs where nothing is.

shared_body:    the transformer without its head, forward and backward from a given gradient; packing not timed.
shared_update:  the same rollouts, packed, with head and loss.
nothing_shared: the whole update of sequences that have no prompt in common, told to share against told not to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, relative_error
from benchmarks.small_model import MEDIUM, dapo, gradient_errors, lognormal_lengths, make_model, make_rollouts, truth
from fastgrpo.config import GRPOConfig
from fastgrpo.loss import policy_loss
from fastgrpo.packing import denominators, pack
from fastgrpo.policy import Policy
from fastgrpo.records import PackedBatch, Rollout
from fastgrpo_kernels import LossConfig

_BUDGET = GRPOConfig.max_tokens_per_microbatch


@dataclass(frozen=True)
class Inputs:
    """Scored rollouts and a policy without gradients; `share` says whether prompts are.

    batch: the rollouts packed into one micro-batch; gradient: [N, D], of the states that predict its tokens.
    """

    rollouts: list[Rollout]
    policy: Policy
    share: bool
    batch: PackedBatch
    gradient: Tensor


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts, and of each one's completions."""

    prompts: Sequence[int]
    completions: Sequence[Sequence[int]]

    @property
    def repeated(self) -> int:
        """Tokens when every completion has a prompt of its own."""
        return sum(len(c) * p + sum(c) for p, c in zip(self.prompts, self.completions, strict=True))

    @property
    def once(self) -> int:
        """Tokens when every prompt is there once."""
        return sum(p + sum(c) for p, c in zip(self.prompts, self.completions, strict=True))


_GROUPS = {count: Lengths([256] * count, [[64] * 16] * count) for count in (1, 2)}
_ALONE = {
    "single": Lengths([100], [[220]]),
    "mixed": Lengths(
        [60, 80, 100, 120, 140, 60, 80, 100], [[n] for n in reversed(lognormal_lengths(8, median=125, sigma=0.6))]
    ),
}


@cache
def _policy() -> Policy:
    policy = Policy(make_model(MEDIUM, packed=True), None)
    policy.self_check()
    assert policy.shares, policy.unshared
    return policy


def make_inputs(seed: int, lengths: Lengths, share: bool) -> Inputs:
    rollouts = make_rollouts(MEDIUM, lengths.prompts, lengths.completions, seed)
    upstream = _upstream(rollouts, seed)
    [batch] = pack(rollouts, max_tokens=_BUDGET, share=share)
    policy = _policy()
    policy.model.zero_grad(set_to_none=True)
    return Inputs(rollouts, policy, share, batch, torch.cat([upstream[i] for i in batch.members]))


def _upstream(rollouts: list[Rollout], seed: int) -> list[Tensor]:
    """A gradient [L, D] for the states that predict each rollout's tokens."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(r.num_tokens, MEDIUM.width, generator=g) for r in rollouts]


def body(x: Inputs) -> Tensor:
    """The states [N, D] that predict the scored tokens."""
    hidden = x.policy.hidden(x.batch)
    hidden.backward(x.gradient)
    return hidden.detach()


def update(x: Inputs) -> Tensor:
    """The loss; one micro-batch."""
    whole = denominators(x.rollouts, mask_truncated=False)
    [batch] = pack(x.rollouts, max_tokens=_BUDGET, share=x.share)
    output = policy_loss(
        x.policy.hidden(batch), x.policy.head, batch, config=LossConfig(), temperature=1.0, whole=whole
    )
    output.loss.backward()
    return output.loss.detach()


def body_errors(x: Inputs, hidden: Tensor, true: Callable[[], tuple[Tensor, list[Tensor]]]) -> dict[str, float]:
    """states: their product with the upstream gradient, relative to that product's parts' norms."""
    total, true_gradients = true()
    states, gradient = hidden.double(), x.gradient.double()
    off = ((states * gradient).sum() - total).abs() / (states.norm() * gradient.norm())
    return {"states": off.item(), **gradient_errors(x.policy.model, true_gradients)}


def update_errors(x: Inputs, loss: Tensor, true: Callable[[], tuple[Tensor, list[Tensor]]]) -> dict[str, float]:
    total, true_gradients = true()
    scale = 1 / sum(r.num_tokens for r in x.rollouts)
    return {"loss": relative_error(loss, scale * total), **gradient_errors(x.policy.model, true_gradients, scale)}


def _body_truth(lengths: Lengths) -> tuple[Tensor, list[Tensor]]:
    rollouts = make_rollouts(MEDIUM, lengths.prompts, lengths.completions, 0)
    of = {id(r): upstream for r, upstream in zip(rollouts, _upstream(rollouts, 0), strict=True)}
    return truth(MEDIUM, rollouts, lambda _, hidden, rollout: (hidden * of[id(rollout)]).sum())


def _update_truth(lengths: Lengths) -> tuple[Tensor, list[Tensor]]:
    return truth(MEDIUM, make_rollouts(MEDIUM, lengths.prompts, lengths.completions, 0), dapo)


def _cases(op: str, params: dict[str, Any], lengths: Lengths, plain: str, rounds: int) -> list[Case]:
    """`plain` repeats the prompts; tokens per second count every prompt once per completion for both."""
    run: Callable[[Inputs], Tensor] = body if op == "shared_body" else update
    errors: Callable[..., dict[str, float]] = body_errors if run is body else update_errors
    true = cache(partial(_body_truth if run is body else _update_truth, lengths))
    return [
        Case(
            op=op,
            peer=peer,
            params={"model": MEDIUM.name, **params},
            tokens=lengths.repeated,
            inputs=partial(make_inputs, lengths=lengths, share=peer == OURS),
            run=run,
            errors=partial(errors, true=true),
            tolerance={"states" if run is body else "loss": 1e-5, "gradient": 1e-4, "missing_gradients": 0},
            rounds=rounds,
            weighed=False,  # a run takes seconds
        )
        for peer in (plain, OURS)
    ]


def _shared(op: str, count: int) -> list[Case]:
    lengths = _GROUPS[count]
    params = {"prompts": count, "prompt": 256, "n": 16, "completion": 64, "ideal": lengths.repeated / lengths.once}
    return _cases(op, params, lengths, "unshared", rounds=2)


CASES = _shared("shared_body", 1) + [
    case
    for name, lengths in _ALONE.items()
    for case in _cases("nothing_shared", {"lengths": name}, lengths, "plain", rounds=3)
]
MORE = _shared("shared_update", 1) + [case for op in ("shared_body", "shared_update") for case in _shared(op, 2)]


def test_shared_prompts(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
