"""`swiglu`: the public function, its op, and the op's PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_tensor


@torch.no_grad()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of an MLP, silu(gate) * up (Shazeer 2020); not differentiable.

    gate, up: [T, F] of one float dtype; views are taken as they are, so both may be halves of one product.

    Returns [T, F] of that dtype, contiguous: silu in fp32 (float64 for float64), rounded, then the product, rounded. On
    the CPU bitwise what transformers' Llama and Qwen compute; a GPU's exponential may move an element of half precision
    by one or two units in the last place. One launch, no wait. NaN passes through. The same inputs give the same bits.
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
