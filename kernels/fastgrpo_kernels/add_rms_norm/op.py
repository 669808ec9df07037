"""`add_rms_norm`: the public function, its ops, and their PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_number, check_tensor


@torch.no_grad()
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalise the sum for the next block; not differentiable.

    x: [T, D] float, what a block gave. residual: [T, D] of its dtype, the stream before, or None: nothing to add.
    weight: [D] of its dtype. eps: >= 0, joins the mean of squares.

    Returns `normed` and `sum`, [T, D] of x's dtype, contiguous. sum = x + residual, rounded; x itself without a
    residual. normed = weight * round(sum / sqrt(mean(sum^2) + eps)), the root in fp32 and each product rounded (Zhang &
    Sennrich 2019): on the CPU bitwise what transformers' Llama and Qwen compute, for float64, too, which they normalise
    in fp32. On a GPU squares are added up in another order, which may move an element of half precision by one or
    two units in the last place. One launch, no wait; NaN spoils its own row. The same inputs give the same bits.
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("x", x, (None, None), "[T, D]")
    rows, size = x.shape
    if size == 0:
        raise ValueError("x: expected shape [T, D] with D >= 1, got D = 0")
    if residual is not None:
        check_tensor("residual", residual, (rows, size), "[T, D]", x.dtype, x.device)
    check_tensor("weight", weight, (size,), "[D]", x.dtype, x.device)
    check_number("eps", eps, 0)
    if residual is None:
        return _rms_norm(x, weight, float(eps)), x
    return _add_rms_norm(x, residual, weight, float(eps))


@torch.library.custom_op("fastgrpo::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if use_triton(x):
        from . import kernel

        return kernel.add_rms_norm(x, residual, weight, eps)
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


@torch.library.custom_op("fastgrpo::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An op of its own, since no op may return what it was given."""
    if use_triton(x):
        from . import kernel

        return kernel.add_rms_norm(x, None, weight, eps)[0]
    return rms_norm(x.contiguous(), weight, eps)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D] of any float dtype, contiguous: the steps and roundings of transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * wide.mul(torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
