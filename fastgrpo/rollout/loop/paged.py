"""Keys and values in pages, for a GPU's flash attention: static shapes, nothing for the host to wait for.

A prompt's full pages are read by all its completions; what is left of it on its last page is copied to the first page
of each. A completion's pages belong to its slot, so its page table never changes while it lives. Needs PyTorch's
`varlen_attn` with a page table (2.13) and half precision. Not done here: softcaps, other numbers of tokens per page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.slabs import KeyShape

# Tokens of a page: flash attention 2 wants multiples of 256.
PAGE = 256
# Of the free memory, what pages may take: the rest is for logits, activations and graphs.
_SHARE = 0.7


def varlen_attn() -> Callable[..., Any]:
    """PyTorch's variable-length flash attention."""
    from torch.nn.attention import varlen

    return varlen.varlen_attn


def why_not_paged(shape: KeyShape) -> str | None:
    """Why this machine or model has no paged flash attention; None when it has."""
    import inspect

    if shape.device.type != "cuda":
        return f"paged attention is for GPUs, not {shape.device.type}"
    if shape.dtype not in (torch.float16, torch.bfloat16) or shape.size % 8 or shape.size > 256:
        return f"paged attention takes half precision and heads of up to 256, not {shape.dtype} and {shape.size}"
    try:
        known = inspect.signature(varlen_attn()).parameters
    except ImportError as error:
        return f"this PyTorch has no varlen_attn: {error}"
    return None if {"block_table", "seqused_k"} <= set(known) else "this PyTorch's varlen_attn has no page table"


class PagedCache:
    """As `SlabCache`, in pages that are all allocated at once.

    rows:       completions alive at once; slot i owns `per_row` pages.
    groups:     prompts kept at once.
    attention:  PyTorch's `varlen_attn`, or what stands in for it.

    Page 0 is nobody's: rows that only fill up a batch write there.
    """

    def __init__(
        self,
        shape: KeyShape,
        *,
        rows: int,
        groups: int,
        longest_prompt: int,
        longest_completion: int,
        attention: Callable[..., Any],
    ) -> None:
        self.shape = shape
        self.attention = attention
        self.per_row, per_prompt = pages_of(longest_prompt, longest_completion)
        first = 1 + rows * self.per_row
        self.free = list(range(first, first + groups * per_prompt))[::-1]
        pages = first + len(self.free)
        self.pool = torch.zeros(
            (shape.layers, 2, pages, PAGE, shape.heads, shape.size), dtype=shape.dtype, device=shape.device
        )
        self.width = (longest_prompt // PAGE) + self.per_row
        self.rows: list[Row] = []

    @property
    def nbytes(self) -> int:
        """Of all pages."""
        return self.pool.numel() * self.pool.element_size()

    def fits(self, groups: Sequence[Group]) -> bool:
        """Are there pages for these prompts?"""
        return sum(-(-len(g.token_ids) // PAGE) for g in groups) <= len(self.free)

    def add_prompts(self, groups: Sequence[Group]) -> None:
        """Make room for the prompts that the next step runs."""
        for group in groups:
            group.length = len(group.token_ids)
            group.pages = [self.free.pop() for _ in range(-(-group.length // PAGE))]

    def add_row(self, row: Row) -> None:
        """The pages of the row's slot, after its prompt's full ones."""
        first = 1 + row.slot * self.per_row
        full = row.group.length // PAGE
        row.pages = row.group.pages[:full] + list(range(first, first + self.per_row))
        if row.group.length % PAGE:
            self.pool[:, :, first] = self.pool[:, :, row.group.pages[-1]]
        self.rows.append(row)

    def remove(self, rows: Sequence[Row]) -> None:
        """Completions that ended, and prompts that nobody needs any more, leave."""
        gone = set(rows)
        self.rows = [row for row in self.rows if row not in gone]
        self.drop({r.group: None for r in rows if not r.group.alive and not r.group.waiting})

    def drop(self, groups: Any) -> None:
        """Give the prompts' pages back."""
        for group in groups:
            self.free += group.pages[::-1]
            group.pages = []

    def step(self, groups: Sequence[Group]) -> PagedStep:
        """The next forward: a token more for every row, and these prompts."""
        for row in self.rows:
            row.length += 1
        used = [row.group.length + row.length for row in self.rows]
        where = [row.pages[(n - 1) // PAGE] * PAGE + (n - 1) % PAGE for row, n in zip(self.rows, used, strict=True)]
        for group in groups:
            where += [group.pages[i // PAGE] * PAGE + i % PAGE for i in range(group.length)]
        device = self.shape.device
        return PagedStep(
            self,
            table=self.table(self.rows).to(device),
            used=torch.tensor(used, dtype=torch.int32, device=device),
            where=torch.tensor(where, dtype=torch.int64, device=device),
            rows=list(self.rows),
            groups=list(groups),
        )

    def table(self, rows: Sequence[Row]) -> Tensor:
        """[rows, width] int32 on the CPU, the pages of each row in order."""
        pages = [row.pages + [0] * (self.width - len(row.pages)) for row in rows]
        return torch.tensor(pages, dtype=torch.int32).view(len(rows), self.width)


class PagedStep:
    """One forward over a `PagedCache`; all that attention reads is in tensors, so it can be captured in a CUDA graph.

    table: [b, width] int32; used: [b] int32, tokens each row sees, its own included; where: [T] int64, where in the
    pool the keys of each token go; the first b tokens are the rows', the rest the groups' prompts.
    """

    def __init__(
        self, cache: PagedCache, table: Tensor, used: Tensor, where: Tensor, rows: list[Row], groups: list[Group]
    ) -> None:
        self.cache = cache
        self.device = cache.shape.device
        self.rows = rows
        self.groups = groups
        self.table, self.used, self.where = table, used, where
        self.each = torch.arange(len(used) + 1, dtype=torch.int32, device=self.device)
        lengths = [group.length for group in groups]
        self.longest = max(lengths, default=0)
        self.bounds = torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)

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
        if softcap is not None:
            raise ValueError(f"flash attention of PyTorch has no softcap, here {softcap}")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        keys, values = self.cache.pool[module.layer_idx]  # type: ignore[index]
        keys.view(-1, *k.shape[1:]).index_copy_(0, self.where, k)
        values.view(-1, *v.shape[1:]).index_copy_(0, self.where, v)
        left = -1 if sliding_window is None else sliding_window - 1
        options = {"scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
        n, longest = len(self.used), self.table.shape[1] * PAGE
        parts = []
        if n:
            parts.append(
                self.cache.attention(
                    q[:n].contiguous(), keys, values, self.each, self.each * longest, 1, longest,
                    window_size=(left, -1 if left < 0 else 0), seqused_k=self.used, block_table=self.table, **options,
                )
            )  # fmt: skip
        if self.groups:
            parts.append(
                self.cache.attention(
                    *(x[n:].contiguous() for x in (q, k, v)), self.bounds, self.bounds, self.longest, self.longest,
                    window_size=(left, 0), **options,
                )
            )  # fmt: skip
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def pages_of(longest_prompt: int, longest_completion: int) -> tuple[int, int]:
    """Pages that belong to a slot, and pages of the longest prompt."""
    rest = min(longest_prompt, PAGE - 1)  # of the prompt, on the slot's first page
    return -(-(rest + longest_completion) // PAGE), -(-longest_prompt // PAGE)


def groups_at_once(rows: int, n: int) -> int:
    """Prompts kept for so many rows: more than fill them, for groups of which only some rows are left."""
    return 2 * -(-rows // n) + 1


def paged_bytes(shape: KeyShape, rows: int, n: int, longest_prompt: int, longest_completion: int) -> int:
    """Of a `PagedCache` for so many rows, `n` of a prompt."""
    per_row, per_prompt = pages_of(longest_prompt, longest_completion)
    pages = 1 + rows * per_row + groups_at_once(rows, n) * per_prompt
    return pages * PAGE * shape.numbers * shape.dtype.itemsize


def rows_within(free: int, shape: KeyShape, rows: int, n: int, longest_prompt: int, longest_completion: int) -> int:
    """Of so many rows as many as pages in `free` bytes of memory serve, halving; at least one."""
    while rows > 1 and paged_bytes(shape, rows, n, longest_prompt, longest_completion) > _SHARE * free:
        rows //= 2
    return rows


def rows_that_fit(shape: KeyShape, rows: int, n: int, longest_prompt: int, longest_completion: int) -> int:
    """`rows_within` the device's free memory."""
    if shape.device.type != "cuda":
        return rows
    free, _ = torch.cuda.mem_get_info(shape.device)
    free += torch.cuda.memory_reserved(shape.device) - torch.cuda.memory_allocated(shape.device)
    return rows_within(free, shape, rows, n, longest_prompt, longest_completion)
