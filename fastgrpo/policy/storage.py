"""Where a model's weights lie: each in memory of its own, but those of one input side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo.products import plain

# Linear maps of the same input, by the names that transformers gives them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Bytes that every weight's address divides by; torch's own on a CPU.
_ALIGNMENT = 64


def own_memory(model: Any) -> None:
    """Give every parameter memory of its own, aligned as torch aligns it; weights of one input follow one another.

    Weights mapped from a file may lie at any address, and some CPU kernels round differently by alignment: a resumed
    run would not be bitwise the run it goes on with. Side by side, several weights can be read as one matrix: a rollout
    multiplies its input once in place of three times. For everything else they are the parameters they were.
    """
    together = {id(p) for linears in _of_one_input(model) for linear in linears for p in linear.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in together:
            tensor.data = tensor.data.clone()
    for linears in _of_one_input(model):
        _lay([linear.weight for linear in linears])
        _lay([linear.bias for linear in linears if linear.bias is not None])


def _of_one_input(model: Any) -> list[list[torch.nn.Linear]]:
    modules: list[list[Any]] = [
        [getattr(module, name, None) for name in names] for module in model.modules() for names in _TOGETHER
    ]
    return [found for found in modules if all(map(plain, found))]


def _lay(tensors: list[Tensor]) -> None:
    """One after the other in new memory, or each in its own where that would misalign one."""
    data: list[Tensor] = [t.data for t in tensors]
    alike = len({(t.dtype, t.device, t.shape[1:]) for t in data}) == 1
    if alike and all(t.numel() * t.element_size() % _ALIGNMENT == 0 for t in data[:-1]):
        parts = torch.cat(data).split([len(t) for t in data])
    else:
        parts = tuple(t.clone() for t in data)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
