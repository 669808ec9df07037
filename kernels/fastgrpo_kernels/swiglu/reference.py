"""SwiGLU in plain PyTorch, in float64: the definition to read first."""

from __future__ import annotations

from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """[T, F] twice -> [T, F] in float64."""
    gate, up = gate.double(), up.double()
    return gate / (1 + (-gate).exp()) * up
