"""Keys and values in slots allocated at once, for a GPU: static shapes, so that a step can be captured in a CUDA graph.

A prompt is kept once, whatever the number of its completions; a completion's own tokens go to the slot it was given.
Decoding reads both through `fastgrpo_kernels.decode_attention`, which writes the new token too; prompts that join run
through the update's own attention. Not done here: slots of several sizes, prompts kept from one rollout to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor

from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.slabs import KeyShape
from fastgrpo_kernels import PackedLayout, decode_attention, shared_prefix_attention

BURST = 8
"""Tokens of every row between two looks at which rows have ended. Half of them are wasted on a row that ends."""

# Of the free memory, what slots may take: the rest is for logits, activations and graphs.
_SHARE = 0.7


def why_not_slots(shape: KeyShape) -> str | None:
    """Why this machine or model has no decoding over slots; None when it has."""
    if shape.device.type != "cuda":
        return f"slots are for GPUs, not {shape.device.type}"
    if shape.dtype == torch.float64 or shape.size > 256:
        return f"decode_attention's kernel takes up to 32 bits and heads of up to 256, not {shape.dtype}, {shape.size}"
    return None if find_spec("triton") else "triton is not installed"


class SlotCache:
    """As `SlabCache`, with a place for every token that there may be.

    rows:   completions alive at once, each with room for `longest_completion` tokens and those of a burst that come
            after its end.
    groups: prompts kept at once, each with room for `longest_prompt` tokens.

    pool:    [layers, 2, places, heads, size]. The first places are nobody's: rows that fill up a batch write there.
    longest: `SlotStep.longest` of the steps that `step` makes.
    """

    def __init__(
        self, shape: KeyShape, *, rows: int, groups: int, longest_prompt: int, longest_completion: int
    ) -> None:
        self.shape = shape
        self.longest_completion = longest_completion
        places, first = _places(rows, groups, longest_prompt, longest_completion)
        self.free = [first + i * longest_prompt for i in range(groups)][::-1]
        self.kept = 0  # prompts
        self.pool = torch.empty(
            (shape.layers, 2, places, shape.heads, shape.size), dtype=shape.dtype, device=shape.device
        )
        self.longest = longest_prompt + longest_completion
        self.rows: list[Row] = []

    @property
    def nbytes(self) -> int:
        """Of all places."""
        return self.pool.numel() * self.pool.element_size()

    def fits(self, groups: Sequence[Group]) -> bool:
        """Is there room for these prompts?"""
        return len(groups) <= len(self.free)

    def add_prompts(self, groups: Sequence[Group]) -> None:
        """Make room for the prompts that the next step runs."""
        for group in groups:
            group.length, group.start = len(group.token_ids), self.free.pop()
        self.kept += len(groups)

    def add_row(self, row: Row) -> None:
        """The row's slot, so far without tokens."""
        row.start = BURST + row.slot * (self.longest_completion + BURST)
        self.rows.append(row)

    def remove(self, rows: Sequence[Row]) -> None:
        """Completions that ended, and prompts that nobody needs any more, leave."""
        gone = set(rows)
        self.rows = [row for row in self.rows if row not in gone]
        self.drop({r.group: None for r in rows if not r.group.alive and not r.group.waiting})

    def drop(self, groups: Iterable[Group]) -> None:
        """Give the prompts' places back."""
        starts = [group.start for group in groups]
        self.free += starts
        self.kept -= len(starts)

    def step(self, groups: Sequence[Group]) -> SlotStep:
        """The next forward: a token more for every row, and these prompts."""
        places = [[row.group.start, row.group.length, row.start, row.length] for row in self.rows]
        for row in self.rows:
            row.length += 1
        where = torch.tensor(places, device=self.shape.device).view(-1, 4).T
        return SlotStep(self, where, self.longest, groups, list(self.rows))


class SlotStep:
    """One forward over a `SlotCache`; without prompts it reads tensors alone, so it can be captured.

    where:   [4, b] int64: of each row its prompt's start and length, its own start, and how many tokens it has kept.
    longest: most tokens that a row may see. It decides how paths are split, and so how results are rounded.
    """

    def __init__(
        self,
        cache: SlotCache,
        where: Tensor,
        longest: int,
        groups: Sequence[Group] = (),
        rows: Sequence[Row] = (),
    ) -> None:
        self.cache = cache
        self.where = where
        self.longest = longest
        self.groups = groups
        self.rows = rows
        if groups:
            self.layout = PackedLayout([g.length for g in groups], [[] for _ in groups], where.device)
            places = chain.from_iterable(range(g.start, g.start + g.length) for g in groups)
            self.places = torch.tensor(list(places), device=where.device)

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
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        keys, values = self.cache.pool[module.layer_idx]  # type: ignore[index]
        n = self.where.shape[1]
        parts = []
        if n:
            parts.append(
                decode_attention(
                    q[:n], k[:n], v[:n], keys, values, self.where,
                    scale=scaling, window=sliding_window, softcap=softcap, longest=self.longest,
                )
            )  # fmt: skip
        if self.groups:
            keys.index_copy_(0, self.places, k[n:])
            values.index_copy_(0, self.places, v[n:])
            parts.append(
                shared_prefix_attention(
                    q[n:], k[n:], v[n:], self.layout, scale=scaling, window=sliding_window, softcap=softcap
                )
            )
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def groups_at_once(rows: int, n: int) -> int:
    """Prompts kept for so many rows: more than fill them, for groups of which only some rows are left."""
    return min(rows, 2 * -(-rows // n) + 1)


def slot_bytes(shape: KeyShape, rows: int, groups: int, longest_prompt: int, longest_completion: int) -> int:
    """Of a `SlotCache` of these sizes."""
    places, _ = _places(rows, groups, longest_prompt, longest_completion)
    return places * shape.numbers * shape.dtype.itemsize


def rows_within(free: int, shape: KeyShape, rows: int, n: int, longest_prompt: int, longest_completion: int) -> int:
    """Of so many rows, `n` of a prompt, as many as `free` bytes of slots serve, halving; at least one."""
    while rows > 1 and slot_bytes(shape, rows, groups_at_once(rows, n), longest_prompt, longest_completion) > free:
        rows //= 2
    return rows


def bytes_for_slots(free: int) -> int:
    """What slots may take of so much free memory."""
    return int(_SHARE * free)


def free_bytes(device: torch.device) -> int:
    """The same of a GPU's memory as it is: what nobody has, and what PyTorch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return bytes_for_slots(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _places(rows: int, groups: int, longest_prompt: int, longest_completion: int) -> tuple[int, int]:
    """How many places there are, and the first one of a prompt: nobody's, the completions', the prompts'."""
    first = BURST + rows * (longest_completion + BURST)
    return first + groups * longest_prompt, first
