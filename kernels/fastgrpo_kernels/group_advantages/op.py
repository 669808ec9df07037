"""`group_advantages` and `GroupRewards`: checks, then Triton (one launch, two for `scale="batch"`) or PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_choice, check_number, check_tensor, compute_dtype
from .reference import group_advantages_reference

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")


@dataclass(frozen=True, eq=False)  # tensors do not compare as one value
class GroupRewards:
    """Rewards to be normalised inside a loss op, in place of advantages; the fields are `group_advantages`'s, eps 1e-4.

    A sample whose reward is NaN then trains no token and leaves the loss's default denominators.
    """

    rewards: Tensor
    group_index: Tensor
    baseline: str = "mean"
    scale: str = "group"

    def advantages(self) -> Tensor:
        """[S], as `group_advantages` gives them."""
        return group_advantages(self.rewards, self.group_index, baseline=self.baseline, scale=self.scale)


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_index: Tensor, *, baseline: str = "mean", scale: str = "group", eps: float = 1e-4
) -> Tensor:
    """Advantage of each sample against the other samples of its prompt.

    rewards:     [S] float; NaN marks a failed sample, which leaves every statistic and gets 0.
    group_index: [S] int64 labels, in any order; groups may differ in size.
    baseline:    what is subtracted: `mean` (GRPO), `leave_one_out` (RLOO), `none` (REINFORCE).
    scale:       what divides: `group` (the group's standard deviation + eps), `batch` (all valid rewards' + eps),
                 `none` (Dr. GRPO). Standard deviations are unbiased (n - 1), as TRL's, and 0 for a single reward.
    eps:         >= 0, in units of the reward.

    Returns [S] fp32 (float64 for float64 rewards), not differentiable. With a baseline, a group with one valid sample
    or with equal rewards gives exactly 0. Infinite rewards are not failures: they make their group NaN, and with
    `scale="batch"` all groups.
    Errors: TypeError or ValueError naming the argument; ValueError for `baseline="none"` with `scale="group"`.
    """
    check_tensor("rewards", rewards, (None,), "[S]")
    check_group_rewards(rewards, group_index, baseline, scale)
    check_number("eps", eps, 0)
    return _group_advantages(rewards, group_index, baseline, scale, eps)


def check_group_rewards(rewards: Tensor, group_index: Tensor, baseline: str, scale: str) -> None:
    """The checks that belong to any use of rewards in groups; errors as in checks.py."""
    check_tensor("group_index", group_index, (rewards.numel(),), "[S]", torch.int64, rewards.device)
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    if baseline == "none" and scale == "group":
        raise ValueError("scale: expected batch or none with baseline='none', got 'group'")


@torch.library.custom_op("fastgrpo::group_advantages", mutates_args=())
def _group_advantages(rewards: Tensor, group_index: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    if not use_triton(rewards):
        advantage = group_advantages_reference(rewards, group_index, baseline, scale, eps)
        return advantage.to(compute_dtype(rewards))
    from .kernel import group_advantages_triton

    return group_advantages_triton(rewards, group_index, baseline, scale, eps)


@_group_advantages.register_fake
def _(rewards: Tensor, group_index: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    return torch.empty(rewards.shape, dtype=compute_dtype(rewards), device=rewards.device)
