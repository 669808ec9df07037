"""What a schedule asks of an LM head, and which of the two heads there are serves it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .host import TorchHead
from .operands import Guess, HeadOperands
from .plan import HeadPlan, HeadProblem, Reach


class Head(Protocol):
    """n rows, of which `forward` takes a window of the plan and `backward`, if at all, the same one right after it."""

    logprob: Tensor  # [n], of the rows that were in a window
    entropy: Tensor  # [n]

    def forward(self, rows: slice, *, keep: bool) -> None:
        """Log-prob and entropy of these rows; `keep` what their gradient needs."""

    def backward(self, rows: slice, grad_logprob: Tensor, grad_entropy: Tensor | None) -> None:
        """Add these rows' part to the gradients, from dL/dlogp and dL/dH, both [n]."""

    def gradients(self) -> list[Tensor]:
        """Of `HeadOperands.differentiable`, in the order and of the sizes of the operands, empty where not needed.

        Rows that were in no `backward` have zeros.
        """


def make_head(
    operands: HeadOperands,
    plan: HeadPlan,
    needs: list[bool],
    index: Tensor | None = None,
    guess: Guess = (None, None),
) -> Head:
    """The head for these tensors' device."""
    if not operands.on_device:
        return TorchHead(operands, plan, needs, index)
    from .device import DeviceHead

    return DeviceHead(operands, plan, needs, index, guess)


def problem_of(
    operands: HeadOperands, num_rows: int, needs: list[bool], reach: Reach, entropy_gradient: bool
) -> HeadProblem:
    """What a plan is made from, for the operands' tensors and num_rows of their rows."""
    return HeadProblem(
        num_rows=num_rows,
        hidden_size=operands.hidden.shape[1],
        vocab_size=operands.weight.shape[0],
        dtype=operands.gemm_dtype,
        trainable=needs[1] or needs[2] or needs[4],
        differentiable=any(needs),
        entropy_gradient=entropy_gradient and any(needs),
        reach=reach,
        on_device=operands.on_device,
        tensor_copies=operands.on_device and _tensor_copies(operands),
        thin=not needs[1],
    )


def _tensor_copies(operands: HeadOperands) -> bool:
    """The epilogue's kernel can be had: half operands in 16-byte rows, and Hopper's or a later GPU's bulk copies."""
    hidden, size = operands.hidden, operands.gemm_dtype.itemsize
    if size != 2 or hidden.shape[1] * size % 16 != 0:
        return False
    if not hidden.is_cuda:
        return True
    if torch.version.hip is not None:
        return False
    major = torch.cuda.get_device_capability(hidden.device)[0]
    uncompilable = major == 10 and operands.bias is not None and operands.softcap is not None  # by Triton 3.9
    return major in (9, 10) and not uncompilable
