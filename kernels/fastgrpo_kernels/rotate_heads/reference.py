"""Rotary embedding in plain PyTorch, in float64: the definition to read first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..add_rms_norm.reference import rms_norm_reference


def rotate_heads_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as of `rotate_heads`; in float64. Number i of a head turns with number i + d/2, by the token's angle."""
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x.double() if weight is None or eps is None else rms_norm_reference(x, weight, eps)
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        rotated.append(x * cos.double()[:, None] + turned * sin.double()[:, None])
    return rotated[0], rotated[1]
