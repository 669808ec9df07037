"""On a GPU: two variable-length flash calls each way, whatever kernels do them, and the merge.

The completions of a prompt are one sequence of queries over the prompt's keys, so that nothing is copied. Backward:
each part is given the merged output and log-sum-exp, which makes its probabilities those of the whole.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..layout import AttentionRanges
from .options import Options, merge_


class VarlenKernels(Protocol):
    """Flash attention over ranges: queries [Nq, Hq, d], keys and values [Nk, Hkv, d], bounds int32 on their device."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        """out [Nq, Hq, d], log-sum-exp [Hq, Nq] in fp32."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the dtype of q. Keys that no query asks may be left unwritten."""


def forward(
    kernels: VarlenKernels, q: Tensor, k: Tensor, v: Tensor, ranges: AttentionRanges, options: Options
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, d] in q's dtype and the scores' log-sum-exp [Hq, T] in fp32."""
    own = (ranges.cu_self, ranges.cu_self, ranges.max_self, ranges.max_self)
    out, lse = kernels.forward(q, k, v, *own, True, options)
    if ranges.num_queries:
        queries, keys, shared = _shared(ranges)
        merge_(out[queries], lse[:, queries], *kernels.forward(q[queries], k[keys], v[keys], *shared, False, options))
    return out, lse


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
    own = (ranges.cu_self, ranges.cu_self, ranges.max_self, ranges.max_self)
    grads = kernels.backward(dout, q, k, v, out, lse, *own, True, options)
    if ranges.num_queries:
        queries, keys, shared = _shared(ranges)
        dq, dk, dv = kernels.backward(
            dout[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous(),
            *shared, False, options,
        )  # fmt: skip
        if ranges.unasked.numel():
            dk, dv = (x.index_fill(0, ranges.unasked, 0) for x in (dk, dv))
        for grad, part, rows in zip(grads, (dq, dk, dv), (queries, keys, keys), strict=True):
            grad[rows].add_(part)
    return grads


def _shared(ranges: AttentionRanges) -> tuple[slice, slice, tuple[Tensor, Tensor, int, int]]:
    queries = slice(ranges.first_query, ranges.first_query + ranges.num_queries)
    return queries, slice(0, ranges.num_keys), (ranges.cu_query, ranges.cu_key, ranges.max_query, ranges.max_key)
