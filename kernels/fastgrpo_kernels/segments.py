"""Sums over the packed sequences of a batch, in float64, in a fixed order (no float atomics), without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[S+1] boundaries -> [N] int64, the sequence each row belongs to. Empty sequences own no row."""
    lengths = cu_seqlens.diff()
    sequence = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(sequence, lengths, output_size=num_rows)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] values, [S+1] boundaries -> [S] float64 sums; an empty sequence sums to 0. Not differentiable."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0)
