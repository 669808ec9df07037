"""On the CPU: PyTorch's flash kernels, once per range; neighbouring ranges of equal length go into one call.

Short sequences of unequal length are gathered, padded at their end and computed together: a call costs more than they
do. Causality keeps their rows from seeing the padding. Half precision is computed in fp32, a range at a time, and
rounded once: as fast here, and more exact. The kernels want as many key heads as query heads: the key heads become a
dimension of the batch and are repeated by a stride of 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..layout import AttentionRanges
from .options import Options, merge_

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Measured: gathering pays for sequences up to SHORT tokens, if there are at least FEW; a bucket holds none shorter than
# LIKE times its longest, which bounds the padding.
SHORT, FEW, LIKE = 64, 4, 0.75


@dataclass(frozen=True)
class _Run:
    """`count` pairs of ranges of equal lengths, in one call.

    queries, keys: the rows, neighbouring ones as a slice, gathered ones as [count * L] indices.
    real: [count * L] bool, which gathered rows are not padding; None = all.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    count: int
    causal: bool
    real: Tensor | None = None


def _runs(query: int, q_bounds: tuple[int, ...], k_bounds: tuple[int, ...], causal: bool, batched: bool) -> list[_Run]:
    """Neighbours of equal lengths together. Ranges without queries are left out."""
    starts: list[list[int]] = []  # of ranges i, i + 1, ...
    sizes = [(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True)]
    for i, size in enumerate(sizes):
        if batched and starts and starts[-1][-1] == i - 1 and sizes[i - 1] == size:
            starts[-1].append(i)
        elif size[0]:
            starts.append([i])
    return [
        _Run(
            slice(query + q_bounds[run[0]], query + q_bounds[run[-1] + 1]),
            slice(k_bounds[run[0]], k_bounds[run[-1] + 1]),
            len(run),
            causal,
        )
        for run in starts
    ]


def _gathered(runs: list[_Run]) -> list[_Run]:
    """The same causal runs, short ones of unequal length in buckets."""
    length = {i: (run.queries.stop - run.queries.start) // run.count for i, run in enumerate(runs)}  # type: ignore[union-attr]
    short = sorted((i for i in length if length[i] <= SHORT), key=lambda i: -length[i])
    buckets: list[list[int]] = []
    for i in short:
        if not buckets or length[i] < LIKE * length[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(i)
    large = [bucket for bucket in buckets if len(bucket) >= FEW]
    moved = {i for bucket in large for i in bucket}
    return [run for i, run in enumerate(runs) if i not in moved] + [
        _bucket([runs[i] for i in bucket], length[bucket[0]]) for bucket in large
    ]


def _bucket(runs: list[_Run], longest: int) -> _Run:
    """One run of all these sequences, padded to the longest by repeating each one's last row."""
    with torch.device("cpu"):
        starts, sizes = [], []
        for run in runs:
            assert isinstance(run.queries, slice)
            size = (run.queries.stop - run.queries.start) // run.count
            starts += list(range(run.queries.start, run.queries.stop, size))
            sizes += [size] * run.count
        step, size = torch.arange(longest), torch.tensor(sizes)[:, None]
        rows = (torch.tensor(starts)[:, None] + torch.minimum(step, size - 1)).flatten()
        return _Run(rows, rows, len(starts), True, (step < size).flatten())


def _parts(ranges: AttentionRanges, options: Options) -> tuple[list[_Run], list[_Run]]:
    """Parts (a) and (b). The bounds lie on the CPU, where reading them waits for nothing."""
    own, query, key = (tuple(x.tolist()) for x in (ranges.cu_self, ranges.cu_query, ranges.cu_key))
    return _plan(own, query, key, ranges.first_query, options.window is None)


@functools.lru_cache(maxsize=16)  # every layer asks, forward and backward
def _plan(
    own: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], first_query: int, batched: bool
) -> tuple[list[_Run], list[_Run]]:
    """batched: without a window, whose mask belongs to one range."""
    runs = _runs(0, own, own, True, batched)
    return _gathered(runs) if batched else runs, _runs(first_query, query, key, False, batched)


@dataclass(frozen=True)
class _Heads:
    """How [rows, H, d] and [H, rows] become the kernels' [batch, heads, length, ...] and back.

    With as many key as query heads all are `heads` of the batch's items; otherwise each key head is an item.
    """

    num_q: int
    num_kv: int

    @property
    def items(self) -> int:
        return 1 if self.num_q == self.num_kv else self.num_kv

    @property
    def per_item(self) -> int:
        return self.num_q // self.items

    def split(self, rows: Tensor, count: int) -> Tensor:
        """[count * L, H, d] -> [count, L, items, heads, d], a view."""
        return rows.unflatten(0, (count, -1)).unflatten(2, (self.items, -1))

    def pack(self, rows: Tensor, count: int) -> Tensor:
        """[count * L, H, d] -> [count * items, per_item, L, d]; a copy if items and ranges are several."""
        x = self.split(rows, count).permute(0, 2, 3, 1, 4).flatten(0, 1)
        return x.expand(-1, self.per_item, -1, -1)

    def unpack(self, x: Tensor, count: int) -> Tensor:
        """[count * items, heads, L, d] -> [count, L, items, heads, d], a view."""
        return x.unflatten(0, (count, -1)).permute(0, 3, 1, 2, 4)

    def unpack_keys(self, x: Tensor, count: int) -> Tensor:
        """The same for a gradient of keys or values: the query heads that read the same key add up."""
        return self.unpack(x if self.items == 1 and self.num_kv > 1 else x.sum(1, keepdim=True), count)

    def pack_lse(self, lse: Tensor, count: int) -> Tensor:
        """[Hq, count * L] -> [count * items, per_item, L]."""
        return lse.reshape(self.items, self.per_item, count, -1).permute(2, 0, 1, 3).flatten(0, 1)

    def unpack_lse(self, lse: Tensor, count: int) -> Tensor:
        """[count * items, per_item, L] -> [Hq, count * L]."""
        return lse.unflatten(0, (count, -1)).permute(1, 2, 0, 3).reshape(self.num_q, -1)

    def put(self, rows: Tensor, part: Tensor, run: _Run, where: slice | Tensor) -> None:
        """Write a run's [count, L, items, heads, d] into [T, H, d]."""
        if run.real is None:
            self.split(rows[where], run.count).copy_(part)
        else:
            rows[where[run.real]] = part.reshape(-1, *rows.shape[1:])[run.real]  # type: ignore[index]


def _mask(run: _Run, position_ids: Tensor, options: Options, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, q_len, k_len], 0 or -inf: the window, and what `causal` says, which it replaces."""
    if options.window is None:
        return None
    distance = position_ids[run.queries][:, None] - position_ids[run.keys]
    hidden = (distance < 0) | (distance >= options.window)
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[None, None]


def forward(q: Tensor, k: Tensor, v: Tensor, ranges: AttentionRanges, options: Options) -> tuple[Tensor, Tensor]:
    """out [T, Hq, d] in q's dtype and the scores' log-sum-exp [Hq, T] in fp32 (float64 for float64)."""
    heads, dtype = _Heads(q.shape[1], k.shape[1]), compute_dtype(q)

    def attend(run: _Run) -> tuple[Tensor, Tensor]:
        x = [heads.pack(t[rows].to(dtype), run.count) for t, rows in zip((q, k, v), _rows(run), strict=True)]
        mask = _mask(run, ranges.position_ids, options, dtype)
        part, part_lse = _flash(*x, 0.0, run.causal and mask is None, attn_mask=mask, scale=options.scale)
        if mask is not None:  # the kernel reports 0 for a row that sees nothing
            part_lse = part_lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        return heads.unpack(part, run.count), heads.unpack_lse(part_lse, run.count)

    own, shared = _parts(ranges, options)
    if len(own) == 1 and own[0].real is None:
        part, lse = attend(own[0])
        out = part.reshape(q.shape)
    else:
        out = torch.empty(q.shape, dtype=dtype)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=dtype)
        for run in own:
            part, part_lse = attend(run)
            heads.put(out, part, run, run.queries)
            if run.real is None:
                lse[:, run.queries] = part_lse
            else:
                lse[:, run.queries[run.real]] = part_lse[:, run.real]  # type: ignore[index]
    for run in shared:
        part, part_lse = attend(run)
        merge_(out[run.queries], lse[:, run.queries], part.reshape(out[run.queries].shape), part_lse)
    return out.to(q.dtype), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ranges: AttentionRanges, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of q: with the merged out and log-sum-exp each part's own gradients simply add up."""
    heads, dtype = _Heads(q.shape[1], k.shape[1]), compute_dtype(q)

    def gradients(run: _Run) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = run.queries, run.keys
        douts = dout[queries].to(dtype)
        if run.real is not None:  # padding asks for nothing
            douts[~run.real] = 0
        qs, o = (heads.pack(x[queries].to(dtype), run.count) for x in (q, out))
        ks, vs = (heads.pack(x[keys].to(dtype), run.count) for x in (k, v))
        mask = _mask(run, ranges.position_ids, options, dtype)
        dq, dk, dv = _flash_backward(
            heads.pack(douts, run.count), qs, ks, vs, o, heads.pack_lse(lse[:, queries], run.count),
            0.0, run.causal and mask is None, attn_mask=mask, scale=options.scale,
        )  # fmt: skip
        return heads.unpack(dq, run.count), heads.unpack_keys(dk, run.count), heads.unpack_keys(dv, run.count)

    own, shared = _parts(ranges, options)
    if len(own) == 1 and own[0].real is None:
        grads = [part.reshape(x.shape) for part, x in zip(gradients(own[0]), (q, k, v), strict=True)]
    else:
        grads = [torch.empty(x.shape, dtype=dtype) for x in (q, k, v)]
        for run in own:
            for grad, part, rows in zip(grads, gradients(run), _rows(run), strict=True):
                heads.put(grad, part, run, rows)
    for run in shared:
        for grad, part, rows in zip(grads, gradients(run), _rows(run), strict=True):
            heads.split(grad[rows], run.count).add_(part)
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


def _rows(run: _Run) -> tuple[slice | Tensor, slice | Tensor, slice | Tensor]:
    return run.queries, run.keys, run.keys
