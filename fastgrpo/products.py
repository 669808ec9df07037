"""Linear maps of one input: one product of weights that lie side by side, or gradients added up by their products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Products:
    """Linear maps of one input, the modules that a module has by these names at the time: adapters may come later.

    If `joined`, one product while their weights lie side by side, without gradients.
    """

    module: Any
    names: tuple[str, ...]
    joined: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        linears = [getattr(self.module, name) for name in self.names]
        if not all(map(plain, linears)):
            return tuple(linear(x) for linear in linears)
        weight, bias = _one_product(linears) if self.joined else (None, None)
        if weight is None:
            biases = [linear.bias for linear in linears]
            return _SameInput.apply(x, *(linear.weight for linear in linears), *biases)
        return F.linear(x, weight, bias).split([linear.out_features for linear in linears], -1)


def plain(linear: Any) -> bool:
    """Does it multiply by a matrix and do nothing else? Quantised ones have weights of another type."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not hooked(linear)


def _one_product(linears: list[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, views; no weight where they are not to be had."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _joined(biases) if biases else None
    if biases and (bias is None or len(biases) < len(weights)):
        return None, None
    return _joined(weights), bias


class _SameInput(torch.autograd.Function):
    """x [T, D], weights, biases (None where there is none) -> as many outputs.

    The gradients of x are added up by the products that make them, not by passes of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights: Any = parameters[:count]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1 : 1 + count]) else None, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, parameters[count:], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad
        gradient = None
        if need_x:
            gradient = outer[0] @ weights[0]
            for g, weight in zip(outer[1:], weights[1:], strict=True):
                gradient.addmm_(g, weight)
        of_weights = [g.T @ x if n else None for g, n in zip(outer, need[: len(outer)], strict=True)]
        of_biases = [g.sum(0) if n else None for g, n in zip(outer, need[len(outer) :], strict=True)]
        return gradient, *of_weights, *of_biases


def _joined(tensors: list[Tensor]) -> Tensor | None:
    """All of them as one, if each begins where the one before it ends."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < end:
        return None  # neighbours by chance
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def hooked(module: Any) -> bool:
    """Does more happen when it is called than its class says? Some libraries give a module a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
