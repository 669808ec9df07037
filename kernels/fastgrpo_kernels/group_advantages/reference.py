"""Group advantages in plain PyTorch. It is both the maths to read first and the path that runs."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages_reference(rewards: Tensor, group_index: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """[S] rewards, [S] group labels -> [S] float64 advantages; the arithmetic is float64 throughout.

    The samples are sorted by group, so that every statistic is a sum over a contiguous segment in a fixed order.
    """
    order = torch.argsort(group_index, stable=True)
    _, group, size = torch.unique_consecutive(group_index[order], return_inverse=True, return_counts=True)
    offsets = torch.cat([size.new_zeros(1), size.cumsum(0)])
    reward = rewards[order].double()
    valid = ~reward.isnan()

    def per_group(values: Tensor, reduce: str) -> Tensor:
        initial = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}[reduce]
        return torch.segment_reduce(values, reduce, offsets=offsets, initial=initial)[group]

    count = per_group(valid.double(), "sum")
    mean = per_group(torch.where(valid, reward, 0), "sum") / count.clamp(min=1)
    deviation = torch.where(valid, reward - mean, 0)

    if baseline == "none":
        advantage = torch.where(valid, reward, 0)
    elif baseline == "mean":
        advantage = deviation
    else:  # leave_one_out: R - mean of the others = n / (n - 1) * (R - mean)
        advantage = deviation * count / (count - 1).clamp(min=1)

    if scale == "group":
        variance = per_group(deviation.square(), "sum") / (count - 1).clamp(min=1)
        advantage = advantage / (variance.sqrt() + eps)
    elif scale == "batch":
        advantage = advantage / (_batch_std(reward, valid) + eps)

    if baseline != "none":
        # The mean of equal rewards need not equal them in floating point, and eps would blow the difference up.
        lowest = per_group(torch.where(valid, reward, torch.inf), "min")
        highest = per_group(torch.where(valid, reward, -torch.inf), "max")
        advantage = torch.where(lowest >= highest, 0, advantage)
    advantage = torch.where(valid, advantage, 0)
    return torch.empty_like(advantage).scatter_(0, order, advantage)


def _batch_std(reward: Tensor, valid: Tensor) -> Tensor:
    """Unbiased standard deviation of the valid rewards; 0 when fewer than two are."""
    count = valid.sum()
    mean = torch.where(valid, reward, 0).sum() / count.clamp(min=1)
    return (torch.where(valid, reward - mean, 0).square().sum() / (count - 1).clamp(min=1)).sqrt()
