"""What every backend is told, and the one piece of arithmetic they share: merging the two parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """scores are `softcap(scale * q k^T)`; a row sees the last `window` rows of its path, itself included, None = all.

    A window that is set is active: some path is longer.
    """

    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Part:
    """Ranges of queries, each with its range of keys.

    cu_q, cu_k: [n+1] int32, their bounds, on the device of the rows. max_q, max_k: the longest. causal: a query sees
    the keys up to its own place, counted from the ends of both ranges; else all.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """In place: attention over two sets of keys, from that over each, rounded once.

    out, other: [N, H, d]. lse, other_lse: [H, N], log-sum-exp of the scores, fp32 or float64; +inf in `other_lse`
    stands for no keys at all, as flash attention 2 and 3 have it, and -inf does, too, as 3 and 4 have it.
    """
    other_lse = other_lse.masked_fill(other_lse == torch.inf, -torch.inf)
    share = torch.sigmoid(other_lse - lse).T[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), other.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, other_lse))
