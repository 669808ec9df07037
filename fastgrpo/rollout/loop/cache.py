"""Attention of the loop engine over keys and values of its own: prompts once per group, completions once per row.

A step's tokens lie in one packed row: first one token of every row that decodes, then whole prompts. A decoding row
attends to its own tokens and to its group's prompt, each in batched matrix products over the slabs, and the two are
merged by their log-sum-exp, which is exact. Sliding windows and softcaps are computed as the model means them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.rollout.loop.slabs import KeyShape, Sequence, Shelves, SlabPool

# A padded batch of prompts holds none shorter than this share of its longest.
_LIKE = 0.75


@dataclass(eq=False)
class Group(Sequence):
    """A prompt and its keys and values.

    index: its place in the list of prompts; logits: [V] of the token after it, and draws: its samples' random numbers,
    until the last one has begun; waiting: its samples that have not begun yet; alive: how many are being decoded;
    start: its first place in a `SlotCache`.
    """

    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    draws: Tensor | None = None
    waiting: list[int] = field(default_factory=list)
    alive: int = 0
    start: int = 0


@dataclass(eq=False)
class Row(Sequence):
    """A completion that is being decoded; its newest token is not among its keys and values yet.

    sample: its place among all samples; slot: where its random numbers are; start: its first place in a `SlotCache`.
    """

    group: Group = field(default_factory=Group)
    sample: int = 0
    slot: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    start: int = 0


class SlabCache:
    """Keys and values of what is being decoded, in slabs; `step` makes the function that attention calls.

    rows: completions alive at once; longest_prompt and longest_completion in tokens.
    """

    def __init__(self, shape: KeyShape, *, rows: int, longest_prompt: int, longest_completion: int) -> None:
        self.pool = SlabPool(shape)
        self.prompts = Shelves(self.pool, rows, longest_prompt)
        self.completions = Shelves(self.pool, rows, longest_completion)

    @property
    def nbytes(self) -> int:
        """Of all that was allocated."""
        return self.pool.nbytes

    def fits(self, groups: Many[Group]) -> bool:
        """Slabs are made when they are needed."""
        return True

    def add_prompts(self, groups: Many[Group]) -> None:
        """Make room for the prompts that the next step runs."""
        for group in groups:
            group.length = len(group.token_ids)
            self.prompts.add(group, group.length)

    def add_row(self, row: Row) -> None:
        """Make room for a completion, so far without tokens in the cache."""
        self.completions.add(row, 1)

    def remove(self, rows: Many[Row]) -> None:
        """Completions that ended, and prompts that nobody needs any more, leave."""
        self.completions.remove(rows)
        self.drop({row.group: None for row in rows if not row.group.alive and not row.group.waiting})

    def drop(self, groups: Iterable[Group]) -> None:
        """These prompts leave."""
        self.prompts.remove(groups)

    def step(self, groups: Many[Group]) -> Step:
        """The next forward: a token more for every row, and these prompts. The batch's order is `Step.rows`."""
        everyone = [s for _, members in self.completions.parts() for s in members]
        self.completions.grow(everyone, 1)
        return Step(self, groups)


@dataclass
class _Part:
    """Sequences of one slab and the rows that attend to them.

    slab:    [layers, 2, per_slab, heads, capacity, size]; the first len(lengths) places count.
    lengths: tokens of each sequence; ahead: what stands between its last key and the query, plus 1: [n, A].
    """

    slab: Tensor
    lengths: Tensor
    longest: int
    ahead: Tensor
    even: bool
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """[n, heads, longest, size] twice, views."""
        keys, values = self.slab[layer, :, : len(self.lengths), :, : self.longest]
        return keys, values

    def mask(self, window: int | None, repeat: int) -> Tensor | None:
        """What is added to scores [n, heads, A * repeat, longest]; None = all are seen."""
        if window not in self.masks:
            mask = self._mask(window)
            several = mask is not None and mask.shape[2] > 1
            self.masks[window] = mask.repeat_interleave(repeat, 2) if mask is not None and several else mask
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        key = torch.arange(self.longest, device=self.lengths.device)
        hidden = None if self.even else (key >= self.lengths[:, None])[:, None]
        if window is not None:
            distance = (self.lengths[:, None] + self.ahead - 1)[:, :, None] - key  # [n, A, longest]
            hidden = distance >= window if hidden is None else hidden | (distance >= window)
        return None if hidden is None else _additive(hidden)


class Step:
    """One forward: which rows and prompts its tokens are, and the function that attention calls in every layer.

    rows: the decoding rows in the batch's order, a token each; groups: the prompts after them.
    """

    def __init__(self, cache: SlabCache, groups: Many[Group]) -> None:
        self.device = cache.pool.shape.device
        self.rows: list[Row] = []
        self.own: list[_Part] = []
        for slab, members in cache.completions.parts():
            self.rows += members  # type: ignore[arg-type]
            self.own.append(self._part(slab, members, torch.zeros(len(members), 1, dtype=torch.int64)))
        self.groups = groups
        self.prompts, self.unpadded = _buckets([group.length for group in groups], self.device)
        self.shared, self.gather, back = self._shared(cache)
        self.back = torch.tensor(back, device=self.device)

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """query [1, Hq, T, d], key and value [1, Hkv, T, d] of the step's tokens -> [1, T, Hq, d]."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        n = len(self.rows)
        parts = [self._decode(layer, _scaled(q[:n], scale), k[:n], v[:n], sliding_window, softcap)] if n else []
        for group in self.groups:
            m = n + group.length
            assert group.shelf is not None
            kept = group.shelf.where(group.place)[layer]
            kept[0, :, : group.length] = k[n:m].transpose(0, 1)
            kept[1, :, : group.length] = v[n:m].transpose(0, 1)
            n = m
        if self.groups:
            q, k, v = (x[len(self.rows) :] for x in (q, k, v))
            found = [
                causal(q[index], k[index], v[index], scale, sliding_window, softcap).flatten(0, 1)
                for index in self.prompts
            ]
            parts.append(_joined(found)[self.unpadded])
        return _joined(parts).unsqueeze(0)

    def _part(self, slab: Tensor, members: Many[Sequence], ahead: Tensor) -> _Part:
        lengths = [s.length for s in members]
        even = min(lengths) == max(lengths)
        return _Part(slab, torch.tensor(lengths, device=self.device), max(lengths), ahead.to(self.device), even)

    def _shared(self, cache: SlabCache) -> tuple[list[_Part], list[Tensor], list[int]]:
        """The prompts' slabs, the rows [n, A] that attend to each prompt, and where each row's result is then found."""
        readers: dict[Group, list[int]] = {}
        for i, row in enumerate(self.rows):
            readers.setdefault(row.group, []).append(i)
        parts, gather, back, base = [], [], [0] * len(self.rows), 0
        own = torch.tensor([row.length for row in self.rows])
        for slab, members in cache.prompts.parts():
            mine = [readers.get(group, []) for group in members]  # type: ignore[call-overload]
            most = max(map(len, mine))
            if not most:
                continue
            for j, rows in enumerate(mine):
                for a, i in enumerate(rows):
                    back[i] = base + j * most + a
            base += len(members) * most
            # Prompts with fewer readers serve row 0.
            index = torch.tensor([rows + [0] * (most - len(rows)) for rows in mine])
            parts.append(self._part(slab, members, own[index]))
            gather.append(index.to(self.device))
        return parts, gather, back

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
        """[n, Hq, d], [n, Hkv, d] twice, a token of each row -> [n, Hq, d]; q is scaled."""
        n, heads, size = k.shape
        q = q.reshape(n, heads, -1, size)
        outs, logs, start = [], [], 0
        for part in self.own:
            rows = slice(start, start + len(part.lengths))
            _append(part, layer, k[rows], v[rows])
            mask = part.mask(window, q.shape[2])
            out, log = attend(q[rows], *part.keys_values(layer), mask, softcap)
            outs.append(out)
            logs.append(log)
            start = rows.stop
        shared, shared_logs = [], []
        for part, index in zip(self.shared, self.gather, strict=True):
            picked = q[index].transpose(1, 2).flatten(2, 3)  # [prompts, heads, A * repeat, size]
            out, log = attend(picked, *part.keys_values(layer), part.mask(window, q.shape[2]), softcap)
            shared.append(out.unflatten(2, (-1, q.shape[2])).transpose(1, 2).flatten(0, 1))
            shared_logs.append(log.unflatten(2, (-1, q.shape[2])).transpose(1, 2).flatten(0, 1))
        other, other_log = _joined(shared)[self.back], _joined(shared_logs)[self.back]
        weight = torch.sigmoid(other_log - _joined(logs))
        return torch.lerp(_joined(outs), other, weight.unsqueeze(-1)).reshape(n, -1, size).to(v.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Queries [n, H, M, d], scaled, over keys and values [n, H, T, d]: out [n, H, M, d] and log-sum-exp [n, H, M].

    mask [n, 1, 1 or M, T] is added to the scores. All is computed in the dtype of q, which is not half precision.
    """
    n, heads, rows, _ = q.shape
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = torch.bmm(q.reshape(n * heads, rows, -1), k.flatten(0, 1).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        scores.view(n, heads, rows, -1).add_(mask)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, v.flatten(0, 1)).div_(total)
    log = top.add_(total.log_())
    return out.unflatten(0, (n, heads)), log.view(n, heads, rows)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Whole prompts, [B, P, Hq, d] and [B, P, Hkv, d] twice -> [B, P, Hq, d]."""
    length, heads, repeat = k.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap is None and (window is None or window >= length):
        k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (length if window is None else window))
    mask = _additive(hidden).repeat(repeat, 1)[None, None]
    queries = _scaled(q, scale).reshape(len(q), heads, repeat * length, -1)
    out, _ = attend(queries, k, v, mask, softcap)
    return out.view(len(q), heads * repeat, length, -1).transpose(1, 2).to(v.dtype)


def _buckets(lengths: list[int], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Prompts of like length in one padded batch: which packed tokens [B, P], and where each token is in all of them.

    Padding repeats a prompt's last token; causality keeps the others from seeing it.
    """
    starts = [0, *itertools.accumulate(lengths)]
    members: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not members or lengths[i] < _LIKE * lengths[members[-1][0]]:
            members.append([])
        members[-1].append(i)
    buckets, back, base = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for bucket in members:
        step = torch.arange(lengths[bucket[0]])
        start, size = (torch.tensor([x[i] for i in bucket])[:, None] for x in (starts, lengths))
        buckets.append((start + torch.minimum(step, size - 1)).to(device))
        for i in bucket:
            back[starts[i] : starts[i + 1]] = torch.arange(base, base + lengths[i])
            base += len(step)
    return buckets, back.to(device)


def _append(part: _Part, layer: int, k: Tensor, v: Tensor) -> None:
    """Write the rows' newest keys and values, [n, heads, size]."""
    keys, values = part.keys_values(layer)
    if part.even:
        keys[:, :, -1], values[:, :, -1] = k, v
        return
    rows = torch.arange(len(k), device=k.device)
    keys[rows, :, part.lengths - 1], values[rows, :, part.lengths - 1] = k, v


def _scaled(q: Tensor, scale: float) -> Tensor:
    """In fp32 at least."""
    return q.to(torch.promote_types(q.dtype, torch.float32)) * scale


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _additive(hidden: Tensor) -> Tensor:
    """0 where seen; otherwise far below any score, but finite: a row that sees nothing must not become NaN.

    [n, A or 1, T] -> [n, 1, A or 1, T], [P, T] -> [P, T]; fp32.
    """
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, torch.finfo(torch.float32).min / 2)
    return mask.unsqueeze(1) if mask.dim() == 3 else mask
