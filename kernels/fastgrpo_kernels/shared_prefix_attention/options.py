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


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """In place: attention over two sets of keys, from that over each, rounded once.

    out, other: [N, H, d]. lse, other_lse: [H, N], log-sum-exp of the scores, fp32 or float64; +inf in `other_lse`
    stands for no keys at all, as flash attention has it, and -inf does, too.
    """
    other_lse = other_lse.masked_fill(other_lse == torch.inf, -torch.inf)
    share = torch.sigmoid(other_lse - lse).T[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), other.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, other_lse))
