"""For what no flash kernel takes: plain matrix products over all T keys, a block of query rows at a time.

Any device, float type, head size, window and softcap, without a wait for the device; the work is T^2 whatever the
layout shares, so it is meant for tests and small models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..layout import AttentionRanges
from .options import Options

BLOCK_ELEMENTS = 1 << 22
"""Scores that exist at a time, at least those of one row."""


@dataclass(frozen=True)
class _Block:
    """rows: the queries. score [Hkv, G, rows, T], -inf where hidden. slope: its derivative by scale * q k^T."""

    rows: slice
    query: Tensor
    score: Tensor
    slope: Tensor | None


def _blocks(q: Tensor, k: Tensor, ranges: AttentionRanges, options: Options) -> Iterator[_Block]:
    """q: [T, Hkv, G, d], k: [T, Hkv, d], of one dtype."""
    num_rows = q.shape[0]
    size = max(1, BLOCK_ELEMENTS // max(1, q.shape[1] * q.shape[2] * num_rows))
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        score = torch.einsum("ihgd,jhd->hgij", q[rows], k) * options.scale
        slope = None
        if options.softcap is not None:
            bent = torch.tanh(score / options.softcap)
            score, slope = options.softcap * bent, 1 - bent * bent
        yield _Block(rows, q[rows], score.masked_fill(~_visible(ranges, rows, options.window), -torch.inf), slope)


def _visible(ranges: AttentionRanges, rows: slice, window: int | None) -> Tensor:
    """[rows, T] bool."""
    position = ranges.position_ids
    row = torch.arange(position.shape[0], dtype=torch.int32, device=position.device)
    sequence = torch.bucketize(row, ranges.cu_self[1:], right=True)
    seen = (sequence[rows, None] == sequence) & (row[rows, None] >= row)
    if ranges.num_queries:
        asks = torch.bucketize(row - ranges.first_query, ranges.cu_query[1:], right=True)
        asks = asks.masked_fill((row < ranges.first_query) | (row >= ranges.first_query + ranges.num_queries), -1)
        answers = torch.bucketize(row, ranges.cu_key[1:], right=True).masked_fill(row >= ranges.num_keys, -2)
        seen |= asks[rows, None] == answers
    if window is not None:
        seen &= position[rows, None] - position < window
    return seen


def forward(q: Tensor, k: Tensor, v: Tensor, ranges: AttentionRanges, options: Options) -> tuple[Tensor, Tensor]:
    """out [T, Hq, d] in q's dtype and the scores' log-sum-exp [Hq, T] in fp32 (float64 for float64)."""
    dtype = compute_dtype(q)
    queries, keys, values = q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype), v.to(dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=dtype, device=q.device)
    for block in _blocks(queries, keys, ranges, options):
        block_lse = block.score.logsumexp(-1, keepdim=True)
        part = torch.einsum("hgij,jhd->ihgd", torch.exp(block.score - block_lse), values)
        out[block.rows] = part.flatten(1, 2).to(q.dtype)
        lse[:, block.rows] = block_lse.flatten(0, 1)[..., 0]
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ranges: AttentionRanges, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype."""
    dtype, num_kv = compute_dtype(q), k.shape[1]
    queries, douts, outs = (x.to(dtype).unflatten(1, (num_kv, -1)) for x in (q, dout, out))
    keys, values = k.to(dtype), v.to(dtype)
    delta = (douts * outs).sum(-1).permute(1, 2, 0)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(queries, keys, ranges, options):
        rows = block.rows
        p = torch.exp(block.score - lse[:, rows].unflatten(0, (num_kv, -1))[..., None])
        dv += torch.einsum("hgij,ihgd->jhd", p, douts[rows])
        dscore = p * (torch.einsum("ihgd,jhd->hgij", douts[rows], values) - delta[..., rows, None]) * options.scale
        if block.slope is not None:
            dscore *= block.slope
        dq[rows] = torch.einsum("hgij,jhd->ihgd", dscore, keys).flatten(1, 2).to(q.dtype)
        dk += torch.einsum("hgij,ihgd->jhd", dscore, block.query)
    return dq, dk.to(q.dtype), dv.to(q.dtype)
