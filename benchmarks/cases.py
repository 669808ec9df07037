"""A case: one peer doing one job on one size of input. What the runner in conftest.py needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "fastgrpo"
"""The peer that the others are compared with."""


@dataclass(frozen=True)
class Case:
    """One row of the results.

    op:        the job; peers doing the same job on the same params are compared, and a results file holds one op.
    peer:      who does it.
    params:    the size, JSON values only.
    tokens:    tokens one run handles, for tokens per second.
    inputs:    seed -> fresh random inputs; not timed.
    run:       inputs -> result; timed. A function of a module, so that a fresh process can find it.
    errors:    (inputs, result) -> how wrong the result is, by name.
    tolerance: the largest error of each name that still counts as right.
    rounds:    timed runs, each on its own inputs.
    """

    op: str
    peer: str
    params: dict[str, Any]
    tokens: int
    inputs: Callable[[int], Any]
    run: Callable[[Any], Any]
    errors: Callable[[Any, Any], dict[str, float]]
    tolerance: dict[str, float]
    rounds: int = 5

    @property
    def size(self) -> str:
        """The job and its size, the same for all peers."""
        return f"{self.op}[{','.join(f'{k}={v}' for k, v in self.params.items())}]"

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.size}-{self.peer}"

    @property
    def module(self) -> str:
        """Where CASES holds this case."""
        return self.run.__module__

    def wrong(self, errors: dict[str, float]) -> dict[str, float]:
        """The errors above their tolerance; NaN is."""
        return {name: error for name, error in errors.items() if not error <= self.tolerance[name]}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def clipped_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, epsilon: float = 0.2) -> Tensor:
    """Sum over the tokens of the clipped surrogate -min(w A, clip(w) A), as in the papers; all arguments [N]."""
    ratio = (logprob - old_logprob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).sum()
