"""Root mean square norm in plain PyTorch, in float64: the definition to read first."""

from __future__ import annotations

from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D] in float64: each row over its root mean square, times the weight."""
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """[T, D], [T, D] or None, [D] -> the norm of the sum and the sum, [T, D] in float64.

    No rounding anywhere: that of the sum, which the next layer reads, counts as an error of the op.
    """
    total = x.double() if residual is None else x.double() + residual.double()
    return rms_norm_reference(total, weight, eps), total
