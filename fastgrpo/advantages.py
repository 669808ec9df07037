"""Rewards -> advantages, normalised within each prompt's group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.records import Rollout
from fastgrpo_kernels import group_advantages

_EPS = 1e-4  # added to every standard deviation divided by, as TRL does


def assign_advantages(rollouts: list[Rollout], weights: dict[str, float], config: GRPOConfig) -> None:
    """Fill in `advantage` from the rewards of one rollout batch.

    weights: reward function name -> weight, for `multi_objective_aggregation=normalize_then_sum`.
    Failed samples (NaN reward) leave every statistic and get 0.
    """
    group = torch.tensor([r.group for r in rollouts])
    reward = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
    if config.multi_objective_aggregation == "normalize_then_sum":
        advantage = _normalize_then_sum(rollouts, group, weights, config)
    else:
        advantage = group_advantages(
            reward, group, baseline=config.advantage_baseline, scale=config.scale_rewards, eps=_EPS
        )
    if config.advantage_whitening:
        advantage = _standardize(advantage, ~reward.isnan(), centred=config.advantage_baseline != "none")
    for rollout, value in zip(rollouts, advantage.tolist(), strict=True):
        rollout.advantage = value


def group_signal(rollouts: list[Rollout]) -> dict[int, bool]:
    """Group -> whether its valid rewards differ, so that it carries a gradient."""
    rewards: dict[int, list[float]] = {}
    for r in rollouts:
        rewards.setdefault(r.group, []).extend([] if r.failed else [r.reward])
    return {g: len(values) > 1 and min(values) != max(values) for g, values in rewards.items()}


def _normalize_then_sum(
    rollouts: list[Rollout], group: Tensor, weights: dict[str, float], config: GRPOConfig
) -> Tensor:
    """GDPO (arXiv 2601.05242): every reward normalised in its group, weighted, summed, normalised over the batch."""
    failed = torch.tensor([r.failed for r in rollouts])
    total = torch.zeros(len(rollouts))
    for name, weight in weights.items():
        reward = torch.tensor([math.nan if r.failed else r.rewards[name] for r in rollouts], dtype=torch.float32)
        total += weight * group_advantages(
            reward, group, baseline=config.advantage_baseline, scale=config.scale_rewards, eps=_EPS
        )
    return _standardize(total, ~failed, centred=config.advantage_baseline != "none")


def _standardize(advantage: Tensor, valid: Tensor, *, centred: bool) -> Tensor:
    """(a - mean) / (std + eps) over the valid samples, 0 for the others and when none differs.

    centred: every group has mean 0 already and the mean is 0 but for rounding: left out, a dead group stays exactly 0.
    """
    values = advantage[valid]
    if values.numel() < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(advantage)
    mean = 0.0 if centred else values.mean()
    return torch.where(valid, (advantage - mean) / (values.std() + _EPS), 0.0)
