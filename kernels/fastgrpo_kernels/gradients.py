"""Gradients that are known in the forward pass, handed out in the backward.

Ops of their own because they have no derivative: differentiating a backward once more is an error, not a wrong number.
What was saved stays as it is and serves any number of backwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 1 << 22
"""Elements that are scaled at a time on the CPU, which casts a result in a copy of its size."""


def scale_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * upstream` (0-d) in `dtype`, a new tensor."""
    return _scale_gradient(gradient, _tracked(upstream), dtype)


def scale_rows_of_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, D] * [N] in `dtype`, a new tensor; 0 where upstream is 0, whatever the row holds."""
    return _scale_rows_of_gradient(gradient, _tracked(upstream), dtype)


def _tracked(upstream: Tensor) -> Tensor:
    """Under `create_graph` a tensor that wants a gradient, so that what comes of it does, too, and then raises.

    The saved gradient is a constant to autograd: without this a penalty on it would add nothing, without a word.
    """
    return upstream.detach().requires_grad_() if torch.is_grad_enabled() else upstream


@torch.library.custom_op("fastgrpo::scale_gradient", mutates_args=())
def _scale_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    if gradient.is_cuda:
        return torch.mul(gradient, upstream, out=scaled)
    for part, out in zip(gradient.contiguous().view(-1).split(PART), scaled.view(-1).split(PART), strict=True):
        torch.mul(part, upstream, out=out)
    return scaled


@torch.library.custom_op("fastgrpo::scale_rows_of_gradient", mutates_args=())
def _scale_rows_of_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    weights = upstream[:, None]
    if gradient.is_cuda:
        torch.mul(gradient, weights, out=scaled)
    else:
        size = max(1, PART // max(1, gradient.shape[1]))
        for part, weight, out in zip(gradient.split(size), weights.split(size), scaled.split(size), strict=True):
            torch.mul(part, weight, out=out)
    return scaled.masked_fill_(weights == 0, 0)


@_scale_gradient.register_fake
@_scale_rows_of_gradient.register_fake
def _(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def into_main_grad(main_grad: Tensor, gradient: Tensor, upstream: Tensor | None) -> None:
    """main_grad += gradient * upstream (0-d, None = 1), in place, both fp32 and of one shape."""
    with torch.no_grad():
        if upstream is None:
            main_grad.add_(gradient)
        else:
            main_grad.addcmul_(gradient, upstream)


def live_rows(grad_logprob: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """int64 indices of the rows with a nonzero upstream gradient: the only ones that a backward needs to look at."""
    live = grad_logprob != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    return live.nonzero()[:, 0]
