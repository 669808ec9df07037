"""On a GPU: two variable-length flash calls each way, whatever kernels do them, and the merge.

The completions of a prompt are one sequence of queries over the prompt's keys, so that nothing is copied. Backward:
each part is given the merged output and log-sum-exp, which makes its probabilities those of the whole. Every kernel
here recomputes the probabilities from the log-sum-exp it is given, and takes nothing else from a forward of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..backend import use_triton
from ..layout import AttentionRanges
from .options import Options, Part, merge_


class VarlenKernels(Protocol):
    """Flash attention over ranges: queries [Nq, Hq, d], keys and values [Nk, Hkv, d], fp16 or bf16."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing runs on this device, None when something does."""

    def unsupported(self, q: Tensor, options: Options) -> str | None:
        """Why this head size, dtype or option does not run where others do. q: [Nq, Hq, d], its form only."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, options: Options) -> tuple[Tensor, Tensor]:
        """out [Nq, Hq, d], log-sum-exp [Hq, Nq] in fp32, +inf or -inf where there are no keys."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the dtype of q, bitwise repeatable. Keys that no query asks may be left unwritten.

        lse: [Hq, Nq] fp32, contiguous; with `out` that of all keys, not only of those here.
        """


def forward(
    kernels: VarlenKernels, q: Tensor, k: Tensor, v: Tensor, ranges: AttentionRanges, options: Options
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, d] in q's dtype and the scores' log-sum-exp [Hq, T] in fp32."""
    out, lse = kernels.forward(q, k, v, _own(ranges), options)
    if ranges.num_queries:
        queries, keys, shared = _shared(ranges)
        _merge(out[queries], lse[:, queries], *kernels.forward(q[queries], k[keys], v[keys], shared, options))
    return out, lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    if use_triton(out):
        from . import kernel

        if kernel.takes(out, lse, other, other_lse):
            return kernel.merge_parts(out, lse, other, other_lse)
    return merge_(out, lse, other, other_lse)


def backward(
    kernels: VarlenKernels,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: AttentionRanges,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype; each is a sum of two numbers, added in fp32 and rounded once."""
    grads = kernels.backward(dout, q, k, v, out, lse, _own(ranges), options)
    if ranges.num_queries:
        queries, keys, shared = _shared(ranges)
        dq, dk, dv = kernels.backward(
            dout[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous(), shared, options
        )
        if ranges.unasked.numel():
            dk, dv = (x.index_fill(0, ranges.unasked, 0) for x in (dk, dv))
        for grad, part, rows in zip(grads, (dq, dk, dv), (queries, keys, keys), strict=True):
            grad[rows].add_(part)
    return grads


def _own(ranges: AttentionRanges) -> Part:
    return Part(ranges.cu_self, ranges.cu_self, ranges.max_self, ranges.max_self, True)


def _shared(ranges: AttentionRanges) -> tuple[slice, slice, Part]:
    queries = slice(ranges.first_query, ranges.first_query + ranges.num_queries)
    part = Part(ranges.cu_query, ranges.cu_key, ranges.max_query, ranges.max_key, False)
    return queries, slice(0, ranges.num_keys), part
