"""The loss of rows that arrive window after window: what a schedule of the LM head asks of it, on either backend.

A window is a slice of the rows. It may cut a sequence unless `config.needs_sequences`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..backend import use_triton
from .arguments import LossOperands
from .coefficients import evaluate
from .inputs import prepare
from .output import LossOutput, Metrics, as_vector

MANY_SEQUENCES = 4096
"""Above it group advantages have a launch of their own: in the loss's every program reads all rewards, S^2 in all."""


class Coefficients(Protocol):
    def rows(
        self,
        start: int,
        stop: int,
        logprob: Tensor,
        entropy: Tensor | None,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Write dL/dlogp and dL/dH of the rows start:stop, from their log-probs and entropies; all tensors are [N].

        Rows that do not train get exactly 0, whatever they hold.
        """

    def finish(self) -> tuple[Tensor, Tensor]:
        """The loss, 0-d float64, and `METRICS`, one float64 vector, once every row has been in a window."""


def coefficients(operands: LossOperands, num_rows: int, like: Tensor) -> Coefficients:
    """The backend for tensors like this one, of the dtype that the loss is computed in.

    The operands must have denominators, and a threshold if there is one.
    """
    if not use_triton(like):
        return _TorchCoefficients(operands, num_rows, like.dtype)
    from .kernel import DeviceCoefficients

    if operands.group_index is not None and operands.advantage.numel() > MANY_SEQUENCES:
        operands = operands.with_advantages(num_rows)
    operands = operands.in_fp32()
    assert operands.num_sequences is not None
    assert operands.num_tokens is not None
    return DeviceCoefficients(
        advantage=operands.advantage,
        per_token=operands.per_token,
        group_index=operands.group_index,
        baseline=operands.baseline,
        scale=operands.scale,
        cu_seqlens=operands.cu_seqlens,
        num_rows=num_rows,
        old=operands.old,
        ref=operands.ref,
        sampling=operands.sampling,
        mask=operands.mask,
        entropy_threshold=operands.entropy_threshold,
        num_sequences=operands.num_sequences,
        num_tokens=operands.num_tokens,
        config=operands.config,
    )


class _TorchCoefficients:
    def __init__(self, operands: LossOperands, num_rows: int, dtype: torch.dtype) -> None:
        self._config = operands.config
        self._inputs = prepare(operands, num_rows, dtype)
        self._loss = torch.zeros((), dtype=torch.float64, device=operands.cu_seqlens.device)
        self._metrics: list[Metrics] = []

    def rows(
        self,
        start: int,
        stop: int,
        logprob: Tensor,
        entropy: Tensor | None,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        rows = slice(start, stop)
        inputs = self._inputs.rows(rows, self._bounds(start, stop))
        result = evaluate(logprob[rows], None if entropy is None else entropy[rows], inputs, self._config)
        grad_logprob[rows] = result.grad_logprob
        if grad_entropy is not None:
            grad_entropy[rows] = 0 if result.grad_entropy is None else inputs.trained * result.grad_entropy
        self._loss += result.loss
        self._metrics.append(result.metrics)

    def _bounds(self, start: int, stop: int) -> Tensor:
        """Boundaries of the sequences in the window, counted from its start; none where no loss term asks for them."""
        cu_seqlens = self._inputs.cu_seqlens
        if not self._config.needs_sequences:
            return cu_seqlens[:0]
        return cu_seqlens[(cu_seqlens >= start) & (cu_seqlens <= stop)] - start

    def finish(self) -> tuple[Tensor, Tensor]:
        return self._loss, as_vector(LossOutput.combine(self._metrics), self._loss.device)
