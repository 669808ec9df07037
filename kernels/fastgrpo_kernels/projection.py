"""The LM head a chunk of rows at a time: GEMMs into and out of one reused [C, V] buffer, never [N, V].

For half inputs the GEMMs run on fp32 copies of vocabulary tiles (the CPU has no half GEMM with fp32 results, and logits
rounded to bf16 are too coarse for importance ratios) and all gradients accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .checks import compute_dtype
from .vocabulary import LogitHead

LOGIT_BUDGET = 64 << 20
"""Bytes of the logits buffer when the caller gives no chunk_size."""

SEQUENCE_BUDGET = 256 << 20
"""Bytes it may grow to when a loss needs whole sequences in a chunk."""

VOCAB_TILE = 2048
"""Columns of one GEMM: on two Zen 4 cores 1.9x faster than one call over V = 50257, whose rows thrash the cache."""


class ChunkedHead:
    """`hidden @ weight.T + bias` for chunks of rows, and the gradients of all three from the gradient of the logits.

    hidden [N, D], weight [V, D], bias [V] or None, of any float dtypes. `chunks` are as long as those to come.
    needs: which of (hidden, weight, bias) want a gradient; the others' GEMMs are left out.
    gradients: theirs, [N, D], [V, D] and [V], fp32 (float64 for float64 inputs) or None; zero until `accumulate` has
    seen a row. Rows are addressed by a slice or an int64 index, each in one chunk at most.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LogitHead,
        chunks: list[slice],
        needs: tuple[bool, ...] = (False, False, False),
    ) -> None:
        self.hidden, self.weight, self.bias, self.head = hidden, weight, bias, head
        self.dtype = compute_dtype(hidden, weight, bias)
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        self._buffer = torch.empty(rows, weight.shape[0], dtype=self.dtype, device=hidden.device)
        self.gradients = tuple(
            torch.zeros_like(x, dtype=self.dtype) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), needs, strict=True)
        )

    def logits(self, rows: slice | Tensor) -> Tensor:
        """[C, V] scaled input (see vocabulary.py) of these rows, a view of the buffer."""
        hidden = self.hidden[rows].to(self.dtype) * self.head.input_scale
        out = self._buffer[: hidden.shape[0]]
        for tile in self._tiles():
            weight = self.weight[tile].to(self.dtype)
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, tile])
            else:
                bias = self.bias[tile].to(self.dtype) * self.head.input_scale
                torch.addmm(bias, hidden, weight.t(), out=out[:, tile])
        return out

    def accumulate(self, rows: slice | Tensor, grad_logits: Tensor) -> None:
        """Add what `logit_gradient_` left of these rows to the gradients."""
        slope = self.head.slope
        grad_hidden, grad_weight, grad_bias = self.gradients
        if grad_hidden is not None:
            grad = grad_hidden.new_zeros(grad_logits.shape[0], self.hidden.shape[1])
            for tile in self._tiles():
                grad.addmm_(grad_logits[:, tile], self.weight[tile].to(self.dtype), alpha=slope)
            grad_hidden[rows] = grad
        if grad_weight is not None:
            grad_weight.addmm_(grad_logits.t(), self.hidden[rows].to(self.dtype), alpha=slope)
        if grad_bias is not None:
            grad_bias.add_(grad_logits.sum(0), alpha=slope)

    def _tiles(self) -> Iterator[slice]:
        vocab_size = self.weight.shape[0]
        for start in range(0, vocab_size, VOCAB_TILE):
            yield slice(start, min(start + VOCAB_TILE, vocab_size))


def chunk_rows(weight: Tensor, dtype: torch.dtype, chunk_size: int | None, longest: int = 0) -> int:
    """Rows of a chunk: `chunk_size`, or as many rows of logits against `weight` as fit LOGIT_BUDGET in `dtype`.

    longest: rows that should stay together; without a chunk_size the chunk grows to hold them within SEQUENCE_BUDGET.
    """
    if chunk_size is not None:
        return chunk_size
    row_bytes = weight.shape[0] * dtype.itemsize
    rows = max(1, LOGIT_BUDGET // row_bytes)
    return max(rows, longest) if longest * row_bytes <= SEQUENCE_BUDGET else rows


def even_chunks(num_rows: int, rows: int) -> list[slice]:
    """Cut num_rows rows into as few chunks of at most `rows` as possible, of nearly equal size."""
    count = -(-num_rows // rows)
    bounds = [num_rows * i // max(count, 1) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]
