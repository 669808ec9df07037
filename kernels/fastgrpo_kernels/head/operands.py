"""The LM head's arguments: checked on the way in, plain tensors inside the ops, as in grpo_loss/arguments.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_bool, check_choice, check_int, check_number, check_target, check_tensor, compute_dtype
from ..vocabulary import LogitHead

Schedule = Literal["epilogue", "single_read", "two_read", "recomputed"]
SCHEDULES = ("epilogue", "single_read", "two_read", "recomputed")


Guess = tuple[Tensor | None, Tensor | None]
"""Log-probs [n] that the rows' may be close to, the best first."""


@dataclass(frozen=True, eq=False)  # tensors do not compare as one value
class LoRADelta:
    """A low-rank change of the LM head: `hidden @ weight.T + scale * (hidden @ a.T) @ b.T`, never formed densely.

    a: [r, D], b: [V, r] float, both differentiable. scale: PEFT's lora_alpha / r.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class HeadArguments:
    """The arguments that `linear_logprob` and `linear_grpo_loss` share, as the caller gave them."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    lora: LoRADelta | None
    chunk_size: int | None
    schedule: str | None
    into_main_grad: bool

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument, before any work; looks at no values of tensors."""
        hidden, weight = self.hidden, self.weight
        check_tensor("hidden", hidden, (None, None), "[N, D]")
        check_tensor("weight", weight, (None, hidden.shape[1]), "[V, D]", device=hidden.device)
        vocab_size = weight.shape[0]
        if vocab_size == 0:
            raise ValueError("weight: expected shape [V, D] with V >= 1, got V = 0")
        if self.bias is not None:
            check_tensor("bias", self.bias, (vocab_size,), "[V]", device=hidden.device)
        check_target(self.target, hidden.shape[0], hidden.device)
        LogitHead(self.logit_scale, self.softcap, self.temperature)
        if self.lora is not None:
            self._check_lora(self.lora)
        check_int("chunk_size", self.chunk_size, 1)
        if self.schedule is not None:
            check_choice("schedule", self.schedule, SCHEDULES)
        check_bool("into_main_grad", self.into_main_grad)
        if self.into_main_grad:
            self._check_main_grad()

    def _check_lora(self, lora: LoRADelta) -> None:
        if not isinstance(lora, LoRADelta):
            raise TypeError(f"lora: expected a LoRADelta, got {type(lora).__name__}")
        check_tensor("lora.a", lora.a, (None, self.hidden.shape[1]), "[r, D]", device=self.hidden.device)
        shape = (self.weight.shape[0], lora.a.shape[0])
        check_tensor("lora.b", lora.b, shape, "[V, r]", device=self.hidden.device)
        check_number("lora.scale", lora.scale)

    def _check_main_grad(self) -> None:
        buffer = getattr(self.weight, "main_grad", None)
        if buffer is None:
            raise ValueError("into_main_grad: expected `weight.main_grad` to be a tensor, the weight has none")
        shape = tuple(self.weight.shape)
        check_tensor("weight.main_grad", buffer, shape, "[V, D]", torch.float32, self.hidden.device)

    def operands(self) -> tuple[Any, ...]:
        """The fields of a `HeadOperands`, in their order."""
        lora_hidden = None
        if self.lora is not None:
            # Rows that do not train may hold NaN, and autograd would add 0 * NaN to the gradient of `a`.
            finite = self.hidden.detach().isfinite().all(-1, keepdim=True)
            rows = torch.where(finite, self.hidden, 0)
            lora_hidden = torch.nn.functional.linear(rows, self.lora.a.to(rows.dtype)) * self.lora.scale
        return (
            self.hidden,
            self.weight,
            self.bias,
            lora_hidden,
            None if self.lora is None else self.lora.b,
            self.target,
            self.logit_scale,
            self.softcap,
            self.temperature,
            self._autocast_dtype(),
            self.chunk_size,
            self.schedule or "",
        )

    def main_grad(self) -> Tensor | None:
        return self.weight.main_grad if self.into_main_grad else None  # type: ignore[attr-defined]

    def _autocast_dtype(self) -> torch.dtype | None:
        """The dtype to which an enclosing autocast rounds a GEMM's operands; it never rounds the logits here."""
        device = self.hidden.device.type
        if self.hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)


@dataclass(frozen=True)
class HeadOperands:
    """The LM head within an op. lora_hidden: [N, r], already scaled; lora_weight: [V, r]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    target: Tensor
    logit_scale: float
    softcap: float | None
    temperature: float
    autocast: torch.dtype | None
    chunk_size: int | None
    schedule: str

    def exactly(self) -> torch.autocast:
        """A context for the work of an op: what is rounded is rounded on purpose, not by an enclosing autocast."""
        return torch.autocast(self.hidden.device.type, enabled=False)

    @property
    def form(self) -> LogitHead:
        return LogitHead(self.logit_scale, self.softcap, self.temperature)

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def gemm_dtype(self) -> torch.dtype:
        """Of the GEMMs' operands: autocast's, else the widest of hidden states and weight."""
        return self.autocast or torch.promote_types(self.hidden.dtype, self.weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probs, entropies and the loss: float64 when an input is float64, else float32."""
        return compute_dtype(self.hidden, self.weight, self.bias)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient, in the order of every list of gradients."""
        return self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight

    def quiet(self, live: Tensor) -> HeadOperands:
        """Rows that are not live hold zeros, so that NaN in them stays out of sums over rows. No host sync."""

        def clean(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(live[:, None], x, 0)

        hidden = clean(self.hidden)
        assert hidden is not None
        target = torch.where(live, self.target, 0)
        return replace(self, hidden=hidden, lora_hidden=clean(self.lora_hidden), target=target)

    @property
    def on_device(self) -> bool:
        """Triton's kernels serve these tensors."""
        return use_triton(self.hidden) and self.dtype == torch.float32

    def new_gradients(self, needs: list[bool]) -> list[Tensor]:
        """Uninitialised gradients of `differentiable` as an op returns them, empty where not needed.

        They have the compute dtype: rounding waits for the upstream gradient.
        """
        wanted = zip(self.differentiable, needs, strict=True)
        shapes = (x.shape if x is not None and needed else (0,) for x, needed in wanted)
        return [self.hidden.new_empty(shape, dtype=self.dtype) for shape in shapes]


def needs_gradient(operands: tuple[Any, ...]) -> list[bool]:
    """Which of the first five operands, the differentiable ones, want a gradient now."""
    enabled = torch.is_grad_enabled()
    return [enabled and isinstance(x, Tensor) and x.requires_grad for x in operands[:5]]


def picked(guess: Guess, rows: slice | Tensor) -> Guess:
    first, second = guess
    return None if first is None else first[rows], None if second is None else second[rows]
