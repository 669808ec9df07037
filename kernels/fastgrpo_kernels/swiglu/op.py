"""`swiglu`: the public function, its op, that of its backward, and their PyTorch path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_tensor, compute_dtype
from ..vocabulary import row_blocks


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of an MLP, silu(gate) * up (Shazeer 2020); differentiable once.

    gate, up: [T, F] of one float dtype; views are taken as they are, so both may be halves of one product.

    Returns [T, F] of that dtype, contiguous: silu in fp32 (float64 for float64), rounded, then the product, rounded. On
    the CPU bitwise what transformers' Llama and Qwen compute; a GPU's exponential may move an element of half precision
    by one or two units in the last place. One launch, no wait. NaN passes through. The same inputs give the same bits.
    Gradients: in fp32 until they are rounded, the two halves of one new [T, 2F] tensor; one launch. Kept for them: gate
    and up as they are.
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("gate", gate, (None, None), "[T, F]")
    check_tensor("up", up, tuple(gate.shape), "[T, F]", gate.dtype, gate.device)
    return _swiglu(gate, up)


@torch.library.custom_op("fastgrpo::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if use_triton(gate):
        from . import kernel

        return kernel.swiglu(gate, up)
    # Contiguous: PyTorch computes the ends of rows without vectors, whose last bits differ.
    return torch.nn.functional.silu(gate.contiguous()).mul_(up)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("fastgrpo::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, grad_out: Tensor) -> Tensor:
    """[T, 2F]: the gradient of gate, and beside it that of up."""
    if use_triton(gate):
        from . import kernel

        return kernel.backward(gate, up, grad_out)
    rows, size = gate.shape
    gradients = gate.new_empty(rows, 2 * size)
    for block in row_blocks(rows, size):
        g, u, upstream = (x[block].contiguous().to(compute_dtype(gate)) for x in (gate, up, grad_out))
        sigmoid = g.sigmoid()
        gradients[block, size:] = upstream * (g * sigmoid)
        gradients[block, :size] = upstream * u * (sigmoid * (1 + g * (1 - sigmoid)))
    return gradients


@_swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, grad_out: Tensor) -> Tensor:
    return gate.new_empty(gate.shape[0], 2 * gate.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    return _swiglu_backward(*ctx.saved_tensors, grad_out).chunk(2, -1)


_swiglu.register_autograd(_backward, setup_context=_save)
