"""The LM head in PyTorch, a window of rows at a time: GEMMs into and out of one reused [C, V] buffer, never [N, V].

For half inputs the GEMMs run on fp32 copies of vocabulary tiles (the CPU has no half GEMM with fp32 results, and logits
rounded to bf16 are too coarse for importance ratios) and all gradients accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..vocabulary import logit_gradient_, logit_statistics
from .operands import HeadOperands
from .plan import VOCAB_TILE, HeadPlan


class TorchHead:
    """Log-probs of windows of rows, and gradients from what the last window left; see `engine.Head`.

    index: [n] int64, the rows of the operands that there are; None = all.
    """

    def __init__(self, operands: HeadOperands, plan: HeadPlan, needs: list[bool], index: Tensor | None) -> None:
        self._operands, self._form, self._index = operands, operands.form, index
        self._target = operands.target if index is None else operands.target[index]
        self._dtype = operands.dtype
        self._gemm_dtype = operands.gemm_dtype if operands.autocast is not None else self._dtype
        new = operands.hidden.new_empty
        self.logprob, self.entropy = (new(self._target.numel(), dtype=self._dtype) for _ in range(2))
        rows = max((window.stop - window.start for window in plan.windows), default=0)
        self._buffer = new(rows, operands.weight.shape[0], dtype=self._dtype)
        self._x = self._peak = self._log_sum = self._buffer[:0]
        self._gradients = [x.zero_() for x in operands.new_gradients(needs)]
        self._needs = needs

    def forward(self, rows: slice, *, keep: bool) -> None:
        self._x = self._logits(self._selected(rows))
        statistics = logit_statistics(self._x, self._target[rows], self._form)
        self.logprob[rows], self.entropy[rows], self._peak, self._log_sum = statistics

    def backward(self, rows: slice, grad_logprob: Tensor, grad_entropy: Tensor | None) -> None:
        slope = None if grad_entropy is None else grad_entropy[rows]
        target, entropy = self._target[rows], self.entropy[rows]
        logit_gradient_(self._x, target, self._peak, self._log_sum, entropy, grad_logprob[rows], slope, self._form)
        self._accumulate(self._selected(rows), self._x)

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def _selected(self, rows: slice) -> slice | Tensor:
        return rows if self._index is None else self._index[rows]

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self._gemm_dtype).to(self._dtype)

    def _tiles(self) -> Iterator[slice]:
        vocab_size = self._operands.weight.shape[0]
        for start in range(0, vocab_size, VOCAB_TILE):
            yield slice(start, min(start + VOCAB_TILE, vocab_size))

    def _logits(self, rows: slice | Tensor) -> Tensor:
        """[C, V] scaled input (see vocabulary.py) of these rows, a view of the buffer."""
        operands, scale = self._operands, self._form.input_scale
        hidden = self._wide(operands.hidden[rows]) * scale
        lora_hidden = None if operands.lora_hidden is None else self._wide(operands.lora_hidden[rows]) * scale
        out = self._buffer[: hidden.shape[0]]
        for tile in self._tiles():
            weight = self._wide(operands.weight[tile])
            if operands.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, tile])
            else:
                torch.addmm(self._wide(operands.bias[tile]) * scale, hidden, weight.t(), out=out[:, tile])
            if lora_hidden is not None:
                assert operands.lora_weight is not None
                out[:, tile].addmm_(lora_hidden, self._wide(operands.lora_weight[tile]).t())
        return out

    def _accumulate(self, rows: slice | Tensor, grad_logits: Tensor) -> None:
        """Add what `logit_gradient_` left of these rows to the gradients."""
        operands, slope = self._operands, self._form.slope
        hidden, weight, bias, lora_hidden, lora_weight = self._gradients
        for grad, into, out_of in (
            (hidden, self._needs[0], operands.weight),
            (lora_hidden, self._needs[3], operands.lora_weight),
        ):
            if into:
                assert out_of is not None
                sum_of_tiles = grad.new_zeros(grad_logits.shape[0], out_of.shape[1])
                for tile in self._tiles():
                    sum_of_tiles.addmm_(grad_logits[:, tile], self._wide(out_of[tile]), alpha=slope)
                grad[rows] = sum_of_tiles
        if self._needs[1]:
            weight.addmm_(grad_logits.t(), self._wide(operands.hidden[rows]), alpha=slope)
        if self._needs[2]:
            bias.add_(grad_logits.sum(0), alpha=slope)
        if self._needs[4]:
            assert operands.lora_hidden is not None
            lora_weight.addmm_(grad_logits.t(), self._wide(operands.lora_hidden[rows]), alpha=slope)
