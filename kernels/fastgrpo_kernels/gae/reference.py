"""GAE in plain PyTorch. It is both the maths to read first and the path that runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import segment_ids


def gae_reference(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`A[t] = delta[t] + gamma * lam * A[t+1]` within each sequence, `delta[t] = r[t] + gamma * V[t+1] - V[t]`.

    rewards, values: [N] of one float dtype. Returns advantages [N] and returns [N] = advantages + values.
    The recurrence runs as a scan by doubling: after step k every row holds its 2^(k+1) nearest terms, so it takes
    log2 of the longest possible sequence steps, whatever the number and lengths of the sequences.
    """
    num_rows = rewards.numel()
    sequence = segment_ids(cu_seqlens, num_rows)
    advantages = rewards + gamma * _ahead(values, sequence, 1) - values
    reach = 1
    while reach < num_rows:
        advantages = advantages + (gamma * lam) ** reach * _ahead(advantages, sequence, reach)
        reach *= 2
    return advantages, advantages + values


def _ahead(x: Tensor, sequence: Tensor, distance: int) -> Tensor:
    """x[n + distance] where that row belongs to the same sequence, 0 elsewhere."""
    shifted = torch.zeros_like(x)
    same = sequence[distance:] == sequence[:-distance]
    shifted[:-distance] = torch.where(same, x[distance:], 0)
    return shifted
