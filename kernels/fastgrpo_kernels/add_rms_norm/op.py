"""`add_rms_norm`: the public function, its ops, that of their backward, and their PyTorch path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_number, check_tensor, compute_dtype
from ..vocabulary import row_blocks


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalise the sum for the next block; differentiable once.

    x: [T, D] float, what a block gave. residual: [T, D] of its dtype, the stream before, or None: nothing to add.
    weight: [D] of its dtype. eps: >= 0, joins the mean of squares.

    Returns `normed` and `sum`, [T, D] of x's dtype, contiguous. sum = x + residual, rounded; x itself without a
    residual. normed = weight * round(sum / sqrt(mean(sum^2) + eps)), the root in fp32 and each product rounded (Zhang &
    Sennrich 2019): on the CPU bitwise what transformers' Llama and Qwen compute, for float64, too, which they normalise
    in fp32. On a GPU squares are added up in another order, which may move an element of half precision by one or
    two units in the last place. One launch, no wait; NaN spoils its own row. The same inputs give the same bits.
    Gradients: of x and residual one tensor, in fp32 until it is rounded; of weight the fp32 sum over tokens, rounded.
    Only `sum` and `weight` are kept for them. On a GPU one launch, two where weight wants one; repeatable, too.
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


@torch.library.custom_op("fastgrpo::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    x: Tensor, weight: Tensor, grad_normed: Tensor, grad_x: Tensor | None, eps: float, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x, to which grad_x is added before it is rounded, and of the weight, [0] if not by_weight."""
    if use_triton(x):
        from . import kernel

        return kernel.backward(x, weight, grad_normed, grad_x, eps, by_weight)
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = x.new_zeros(weight.shape if by_weight else (0,), dtype=compute_dtype(x))
    for rows in row_blocks(*x.shape):
        found, by_rows = rms_norm_gradients(x[rows], weight, grad_normed[rows], eps, by_weight)
        gradient[rows] = found if grad_x is None else found + grad_x[rows]
        sums += by_rows
    return gradient, sums.to(weight.dtype)


@_rms_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, grad_normed: Tensor, grad_x: Tensor | None, eps: float, by_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if by_weight else (0,))


def _gradients(
    ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None, by_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if grad_normed is None:
        return grad_sum, None
    by_sum, of_weight = _rms_norm_backward(*ctx.saved_tensors, grad_normed, grad_sum, ctx.eps, by_weight)
    return by_sum, of_weight if by_weight else None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    by_sum, by_weight = _gradients(ctx, grad_normed, grad_sum, ctx.needs_input_grad[2])
    return by_sum, by_sum, by_weight, None


def _save_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_normed, None, ctx.needs_input_grad[1]), None


_add_rms_norm.register_autograd(_add_backward, setup_context=_save_sum)
_rms_norm.register_autograd(_backward, setup_context=_save_x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D] of any float dtype, contiguous: the steps and roundings of transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * wide.mul(torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_gradients(
    x: Tensor, weight: Tensor, grad_normed: Tensor, eps: float, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """[R, D] of any float dtype, [D], and [R, D] -> the gradients of x, fp32, and of weight, [0] if not by_weight.

    Neither is rounded to x's dtype. That of the weight is summed in fp32, of float64 in float64.
    """
    x, grad_normed, sums = x.contiguous(), grad_normed.contiguous(), compute_dtype(x)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    grad_normed = grad_normed.to(sums)
    slope = (grad_normed * weight.to(sums)).float()
    gradient = (slope - normed * (slope * normed).mean(-1, keepdim=True)).mul_(scale)
    if not by_weight:
        return gradient, gradient.new_empty(0, dtype=sums)
    return gradient, (grad_normed * normed.to(x.dtype).to(sums)).sum(0)
