"""The LM head on a GPU: cuBLAS or our own GEMM, row kernels between, the gradient rows of a chunk at a time.

Rows of dL/dlogits are kept as `R`, and one factor a row, `f`: dL/dlogits = f * R. So R can be written before the loss's
coefficients are known, and the factor goes into the [C, D] matrices: dH = f * (R @ W), dW += R.T @ (f * h), summed in
fp32. Row strides are padded, so that accesses are wide for any V. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..token_logprob import kernel as passes
from .device_gemm import add_mm, mm
from .exp_gemm.config import num_tiles
from .exp_gemm.kernel import exp_gemm
from .operands import Guess, HeadOperands, picked
from .plan import HeadPlan
from .rows.kernel import single_read, target_logit
from .settle.kernel import reshift, row_factor, scale_rows, settle

PAD = 64
"""Row strides of logits and of gradient rows are multiples of it."""


class DeviceHead:
    """See `engine.Head`. index: [n] int64, the rows of the operands that there are; None = all."""

    def __init__(
        self,
        operands: HeadOperands,
        plan: HeadPlan,
        needs: list[bool],
        index: Tensor | None,
        guess: Guess,
    ) -> None:
        self._plan, self._needs, self._guess, self._form = plan, needs, guess, operands.form
        self._ceiling = None if operands.softcap is None else operands.form.ceiling
        dtype = operands.gemm_dtype
        self._hidden = _Rows(operands.hidden, index, dtype)
        self._weight, self._bias = _side_by_side(operands.weight.to(dtype)), operands.bias
        self._lora: tuple[_Rows, Tensor] | None = None
        if operands.lora_hidden is not None and operands.lora_weight is not None:
            lora_weight = _side_by_side(_padded(operands.lora_weight.to(dtype)))
            self._lora = _Rows(_padded(operands.lora_hidden), index, dtype), lora_weight
        self._target = (operands.target if index is None else operands.target[index]).contiguous()
        new, size = operands.hidden.new_empty, self._target.numel()
        self.logprob, self.entropy, self._row_sum, self._factor = (new(size, dtype=torch.float32) for _ in range(4))
        self._sums = _Sums(operands, needs, index)
        width = -(-operands.weight.shape[0] // PAD) * PAD
        any_gradient = any(needs)
        self._chunk = new(plan.chunk_rows if any_gradient else 0, width, dtype=dtype)[:, : operands.weight.shape[0]]
        self._logits = new(plan.logit_rows, width, dtype=torch.float32)[:, : operands.weight.shape[0]]
        self._filled = slice(0, 0)  # the rows whose gradient rows are in the chunk
        self._peak = self._log_sum = self.logprob[:0]

    def forward(self, rows: slice, *, keep: bool) -> None:
        if rows.start == rows.stop:
            return
        if keep:
            self._make_room(rows)
        if self._plan.method == "epilogue":
            self._epilogue(rows, keep)
        elif self._plan.method == "single_read" and keep:
            for part in _parts(rows, self._plan.logit_rows):
                self._single_read(part)
        else:
            for part in _parts(rows, self._plan.logit_rows):
                self._two_read(part)

    def backward(self, rows: slice, grad_logprob: Tensor, grad_entropy: Tensor | None) -> None:
        if rows.start == rows.stop:
            return
        d_logprob = grad_logprob[rows]
        if self._plan.method != "two_read":
            self._factor[rows] = row_factor(d_logprob, self._row_sum[rows], self._form.slope)
        else:
            d_entropy = None if grad_entropy is None else grad_entropy[rows]
            if self._factored:
                size = d_logprob.abs() if d_entropy is None else d_logprob.abs() + d_entropy.abs()
                self._factor[rows] = size
                over = torch.where(size > 0, 1 / size, 0)
                d_logprob, d_entropy = d_logprob * over, None if d_entropy is None else d_entropy * over
            logits, target, entropy = self._logits[: _length(rows)], self._target[rows], self.entropy[rows]
            out = self._room(rows)
            passes.backward(
                logits, target, self._peak, self._log_sum, entropy, d_logprob, d_entropy, self._form, out=out
            )
        self._filled = slice(self._filled.start, rows.stop)

    def gradients(self) -> list[Tensor]:
        self._flush()
        return self._sums.finished()

    @property
    def _factored(self) -> bool:
        """Gradient rows leave a factor out: for want of it, or because fp16 would lose numbers of 1 / num_tokens."""
        return self._plan.method != "two_read" or self._weight.dtype == torch.float16

    def _room(self, rows: slice) -> Tensor:
        """Where the gradient rows of these rows are in the chunk."""
        first = self._filled.start
        return self._chunk[rows.start - first : rows.stop - first]

    def _make_room(self, rows: slice) -> None:
        if rows.start != self._filled.stop or rows.stop - self._filled.start > self._chunk.shape[0]:
            self._flush()
            self._filled = slice(rows.start, rows.start)

    def _flush(self) -> None:
        """The GEMMs from the gradient rows that are in the chunk; then it is empty."""
        rows = self._filled
        if rows.stop > rows.start:
            factor = self._factor[rows] if self._factored else None
            lora = None if self._lora is None else (self._lora[0][rows], self._lora[1])
            self._sums.add(rows, self._room(rows), factor, self._hidden[rows], self._weight, lora)
        self._filled = slice(rows.stop, rows.stop)

    def _low_rank(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        return None if self._lora is None else (self._lora[0][rows], self._lora[1])

    def _epilogue(self, rows: slice, keep: bool) -> None:
        hidden, low_rank, target, count = self._hidden[rows], self._low_rank(rows), self._target[rows], _length(rows)
        form: dict[str, Any] = {"input_scale": self._form.input_scale, "bias": self._bias, "low_rank": low_rank}
        guess = picked(self._guess, rows)
        z_y, shift = target_logit(hidden, self._weight, target, guess=guess, ceiling=self._ceiling, **form)
        sums, moments = hidden.new_empty(2, num_tiles(self._weight.shape[0]), count, dtype=torch.float32)
        flags = torch.empty(count, dtype=torch.int32, device=hidden.device)
        out = self._room(rows) if keep else None
        written = {"logprob": self.logprob[rows], "entropy": self.entropy[rows], "row_sum": self._row_sum[rows]}

        def launch(mode: Literal["statistics", "exp", "max", "rescue"], flagged: Tensor | None = None) -> None:
            exp_gemm(
                hidden, self._weight, shift, sums, moments,
                mode=mode, ceiling=self._ceiling, out=None if mode == "max" else out, flags=flagged, **form,
            )  # fmt: skip

        def finish(only_flagged: bool) -> None:
            settle(
                sums, moments, z_y, shift, target,
                flags=flags, out=out, ceiling=self._ceiling, only_flagged=only_flagged, **written,
            )  # fmt: skip

        launch("exp" if keep else "statistics")
        finish(only_flagged=False)
        # Rows whose guess was too far off, normally none: the launches find that out on the device.
        launch("max", flags)
        reshift(sums, flags, shift)
        launch("rescue", flags)
        finish(only_flagged=True)

    def _fp32_logits(self, rows: slice) -> Tensor:
        """[C, V] before `input_scale`, in the buffer."""
        out = self._logits[: _length(rows)]
        mm(self._hidden[rows], self._weight.t(), out=out)
        if self._lora is not None:
            add_mm(out, self._lora[0][rows], self._lora[1].t())
        if self._bias is not None:
            out += self._bias
        return out

    def _single_read(self, rows: slice) -> None:
        logits = self._fp32_logits(rows)
        single_read(
            logits,
            self._target[rows],
            torch.empty_like(self.logprob[rows]),
            None,
            self._room(rows),
            input_scale=self._form.input_scale,
            ceiling=self._ceiling,
            logprob=self.logprob[rows],
            entropy=self.entropy[rows],
            row_sum=self._row_sum[rows],
            guess=picked(self._guess, rows),
        )

    def _two_read(self, rows: slice) -> None:
        logits = self._fp32_logits(rows)
        statistics = passes.forward(logits, self._target[rows], self._form)
        self.logprob[rows], self.entropy[rows], self._peak, self._log_sum = statistics


class _Rows:
    """`rows[slice]` of a matrix, in a dtype, columns side by side; of the rows in `index` where there is one."""

    def __init__(self, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> None:
        self._x, self._index, self._dtype = x, index, dtype

    def __getitem__(self, rows: slice) -> Tensor:
        x = self._x[rows] if self._index is None else self._x.index_select(0, self._index[rows])
        return _side_by_side(x.to(self._dtype))


class _Sums:
    """The gradients, as chunks of gradient rows add to them."""

    def __init__(self, operands: HeadOperands, needs: list[bool], index: Tensor | None) -> None:
        self._needs, self._index, self._empty = needs, index, True
        self._gradients = operands.new_gradients(needs)
        if index is not None:
            for i in (0, 3):
                self._gradients[i].zero_()

    def add(
        self,
        rows: slice,
        chunk: Tensor,
        factor: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        lora: tuple[Tensor, Tensor] | None,
    ) -> None:
        """The part of these rows: gradient rows `chunk` [C, V], times `factor` [C] where there is one."""
        grad_hidden, grad_weight, grad_bias, grad_lora_hidden, grad_lora_weight = self._gradients
        if self._needs[0]:
            self._add_rows(grad_hidden, rows, chunk, factor, weight)
        if self._needs[3]:
            assert lora is not None
            self._add_rows(grad_lora_hidden, rows, chunk, factor, lora[1])
        if self._needs[1]:
            self._add_sum(grad_weight, chunk, factor, hidden)
        if self._needs[2]:
            ones = hidden.new_ones(hidden.shape[0], 1)
            self._add_sum(grad_bias[:, None], chunk, factor, ones)
        if self._needs[4]:
            assert lora is not None
            self._add_sum(grad_lora_weight, chunk, factor, lora[0])
        self._empty = False

    def _add_rows(self, into: Tensor, rows: slice, chunk: Tensor, factor: Tensor | None, weight: Tensor) -> None:
        in_place = self._index is None and weight.shape[1] == into.shape[1]
        product = into[rows] if in_place else into.new_empty(chunk.shape[0], weight.shape[1])
        mm(chunk, weight, out=product)
        product = product[:, : into.shape[1]]
        if factor is not None:
            scale_rows(product, factor, product)
        if self._index is not None:
            into.index_copy_(0, self._index[rows], product)
        elif not in_place:
            into[rows] = product

    def _add_sum(self, into: Tensor, chunk: Tensor, factor: Tensor | None, x: Tensor) -> None:
        largest = None
        if factor is not None:
            if x.dtype == torch.float16:  # factors of 1 / num_tokens are too small for it
                largest = factor.abs().amax()
                factor = factor / largest.clamp(min=torch.finfo(torch.float32).tiny)
            scaled = torch.empty_like(x)
            scale_rows(x, factor, scaled)
            x = scaled
        x = x[:, : into.shape[1]]
        if largest is not None:
            part = torch.empty_like(into)
            mm(chunk.t(), x, out=part)
            part *= largest
            into.copy_(part) if self._empty else into.add_(part)
        elif self._empty:
            mm(chunk.t(), x, out=into)
        else:
            add_mm(into, chunk.t(), x)

    def finished(self) -> list[Tensor]:
        if self._empty:
            for gradient in self._gradients:
                gradient.zero_()
        return self._gradients


def _side_by_side(x: Tensor) -> Tensor:
    """The matrix with columns side by side and rows on 16-byte boundaries: itself where it is so, else a copy."""
    aligned = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return (
        x
        if aligned or (x.is_contiguous() and x.data_ptr() % 16 == 0)
        else x.clone(memory_format=torch.contiguous_format)
    )


def _padded(x: Tensor) -> Tensor:
    """[*, r] with zero columns up to a multiple of 8, as bulk copies of rows need."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _parts(rows: slice, size: int) -> list[slice]:
    return [slice(a, min(a + size, rows.stop)) for a in range(rows.start, rows.stop, max(size, 1))]
