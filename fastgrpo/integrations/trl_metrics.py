"""The figures TRL 1.16's GRPOTrainer logs about a loss, from log-probabilities that were computed elsewhere.

Same names and definitions; one reduction, one gathering and two transfers to the host for all of them. Not done: TRL
counts sequences in place of tokens when completions are one token long; here tokens are always counted as tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import LossConfig
from fastgrpo_kernels.grpo_loss.config import CLIPPED


def policy_metrics(
    accelerator: Any,
    config: LossConfig,
    mask: Tensor,
    advantage: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
) -> dict[str, float]:
    """`kl`, `entropy`, `clip_ratio/*` or `cispo_clip_ratio`, over all processes.

    mask: [B, C] bool, tokens that train. advantage: [B]. The others: [B, C], right where the mask is True.
    Means are over tokens, or over sequences for a ratio (and what depends on it) at the sequence level.
    """
    log_ratio = torch.zeros_like(logprob) if old_logprob is None else torch.where(mask, logprob - old_logprob, 0)
    if config.importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)
    ratio = log_ratio.exp()
    averaged = {"entropy": entropy}
    if config.beta != 0:
        assert ref_logprob is not None
        d = torch.where(mask, ref_logprob - logprob, 0)
        kl = d.exp() - d - 1
        averaged["kl"] = kl * ratio if config.kl_bias_correction else kl
    signs = advantage.unsqueeze(1)
    low, high = config.clip_range
    extremes: list[Tensor] = []
    if config.loss_type in CLIPPED:
        if config.delta is not None:
            ratio = ratio.clamp(max=config.delta)
        below, above = (ratio < low) & (signs < 0), (ratio > high) & (signs > 0)
        for name, clipped in (("low_mean", below), ("high_mean", above), ("region_mean", below | above)):
            averaged[f"clip_ratio/{name}"] = clipped
        extremes = [_sequence_mean(clipped, mask) for clipped in (below, above)]
    elif config.loss_type == "cispo":
        averaged["cispo_clip_ratio"] = (ratio > high) & (signs > 0)
    metrics = global_means(accelerator, averaged, mask)
    if extremes:
        below, above = accelerator.gather(torch.stack(extremes, dim=1)).unbind(1)
        lowest, highest = below.nan_to_num(nan=torch.inf).amin(), above.nan_to_num(nan=-torch.inf).amax()
        values = torch.stack([lowest, highest]).tolist()
        names = ("clip_ratio/low_min", "clip_ratio/high_max")
        for name, value in zip(names, values, strict=True):
            metrics[name] = value if abs(value) != torch.inf else float("nan")
    return metrics


def global_means(accelerator: Any, values: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """The means over all processes: of [B, C] over the tokens of the mask, of [B, 1] (with C > 1) over sequences."""
    parts = []
    for value in values.values():
        counted = mask if value.shape == mask.shape else torch.ones_like(value, dtype=torch.bool)
        parts.append(torch.stack([torch.where(counted, value, 0).sum(dtype=torch.float32), counted.sum().float()]))
    totals = accelerator.reduce(torch.stack(parts), reduction="sum").tolist()
    return {name: total / max(count, 1.0) for name, (total, count) in zip(values, totals, strict=True)}


def _sequence_mean(flags: Tensor, mask: Tensor) -> Tensor:
    """[B] mean over each sequence's tokens, NaN for a sequence without any; [B, 1] is that mean already."""
    if flags.shape != mask.shape:
        return flags.squeeze(1).float()
    return (flags & mask).sum(1) / mask.sum(1)
