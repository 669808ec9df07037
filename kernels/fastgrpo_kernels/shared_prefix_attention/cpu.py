"""On the CPU: PyTorch's flash kernels, once per range; neighbouring ranges of equal length go into one call.

Half precision is computed in fp32, a range at a time, and rounded once: as fast here, and more exact. The kernels want
as many key heads as query heads: the key heads become a dimension of the batch and are repeated by a stride of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..layout import AttentionRanges
from .options import Options, merge_

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class _Run:
    """`count` neighbouring pairs of ranges: q_len queries from row `query` on, k_len keys from row `key` on."""

    query: int
    q_len: int
    key: int
    k_len: int
    count: int
    causal: bool

    @property
    def queries(self) -> slice:
        return slice(self.query, self.query + self.q_len * self.count)

    @property
    def keys(self) -> slice:
        return slice(self.key, self.key + self.k_len * self.count)


def _runs(query: int, q_bounds: list[int], k_bounds: list[int], causal: bool, batched: bool) -> list[_Run]:
    """Ranges without queries are left out."""
    runs: list[_Run] = []
    for i in range(len(q_bounds) - 1):
        q_len, k_len = q_bounds[i + 1] - q_bounds[i], k_bounds[i + 1] - k_bounds[i]
        run = _Run(query + q_bounds[i], q_len, k_bounds[i], k_len, 1, causal)
        last = runs[-1] if runs else None
        follows = last and (last.q_len, last.k_len, last.keys.stop) == (q_len, k_len, run.key)
        if last and follows and batched:
            runs[-1] = replace(last, count=last.count + 1)
        elif q_len:
            runs.append(run)
    return runs


def _parts(ranges: AttentionRanges, options: Options) -> tuple[list[_Run], list[_Run]]:
    """Parts (a) and (b). The bounds lie on the CPU, where reading them waits for nothing."""
    own, query, key = (x.tolist() for x in (ranges.cu_self, ranges.cu_query, ranges.cu_key))
    batched = options.window is None  # a mask belongs to one range
    return _runs(0, own, own, True, batched), _runs(ranges.first_query, query, key, False, batched)


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
        return lse.view(self.items, self.per_item, count, -1).permute(2, 0, 1, 3).flatten(0, 1)

    def unpack_lse(self, lse: Tensor, count: int) -> Tensor:
        """[count * items, per_item, L] -> [Hq, count * L]."""
        return lse.unflatten(0, (count, -1)).permute(1, 2, 0, 3).reshape(self.num_q, -1)


def _mask(run: _Run, position_ids: Tensor, options: Options, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, q_len, k_len], 0 or -inf: the window, and what `causal` says, which it replaces."""
    if options.window is None:
        return None
    distance = position_ids[run.queries, None] - position_ids[run.keys]
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
    if len(own) == 1:
        part, lse = attend(own[0])
        out = part.reshape(q.shape)
    else:
        out = torch.empty(q.shape, dtype=dtype)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=dtype)
        for run in own:
            part, lse[:, run.queries] = attend(run)
            heads.split(out[run.queries], run.count).copy_(part)
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
        d, qs, o = (heads.pack(x[queries].to(dtype), run.count) for x in (dout, q, out))
        ks, vs = (heads.pack(x[keys].to(dtype), run.count) for x in (k, v))
        mask = _mask(run, ranges.position_ids, options, dtype)
        dq, dk, dv = _flash_backward(
            d, qs, ks, vs, o, heads.pack_lse(lse[:, queries], run.count),
            0.0, run.causal and mask is None, attn_mask=mask, scale=options.scale,
        )  # fmt: skip
        return heads.unpack(dq, run.count), heads.unpack_keys(dk, run.count), heads.unpack_keys(dv, run.count)

    own, shared = _parts(ranges, options)
    if len(own) == 1:
        grads = [part.reshape(x.shape) for part, x in zip(gradients(own[0]), (q, k, v), strict=True)]
    else:
        grads = [torch.empty(x.shape, dtype=dtype) for x in (q, k, v)]
        for run in own:
            for grad, part, rows in zip(grads, gradients(run), _rows(run), strict=True):
                heads.split(grad[rows], run.count).copy_(part)
    for run in shared:
        for grad, part, rows in zip(grads, gradients(run), _rows(run), strict=True):
            heads.split(grad[rows], run.count).add_(part)
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


def _rows(run: _Run) -> tuple[slice, slice, slice]:
    return run.queries, run.keys, run.keys
