"""Where prompts and completions lie in a packed row in which the completions of a prompt share it.

Token order: all prompts first (1, 2, ...), then the completions of prompt 1, of prompt 2, ... Prompts and completions
are then contiguous views, and nothing is padded or copied. This file computes positions and indices only; attention
over the layout is an op of its own. Sequences that share nothing are prompts without completions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRanges:
    """Which rows attend to which, in the form of variable-length kernels: two lists of ranges, made once per layout.

    Part (a): every row attends causally within its own sequence; the sequences tile all T rows.
    Part (b): the completions of a prompt, one range of queries, attend to all of that prompt, one range of keys.
    A completion that follows its prompt in memory, alone, is one sequence with it and takes no part in (b): one prompt
    with one completion costs what plain packing costs.

    position_ids: [T] int64.
    cu_self:      [A+1] int32, the bounds of (a).
    cu_query:     [B+1] int32, the bounds of (b)'s queries, counted from row `first_query`.
    cu_key:       [B+1] int32, the bounds of (b)'s keys: the first B prompts, up to the last one that is asked.
    unasked:      int64, rows of those prompts that no query asks.
    max_self, max_query, max_key: the longest range of each.
    first_query, num_queries, num_keys: (b)'s queries are rows first_query .. first_query + num_queries, its keys rows
                  0 .. num_keys; without queries there is no (b).
    """

    position_ids: Tensor
    cu_self: Tensor
    cu_query: Tensor
    cu_key: Tensor
    unasked: Tensor
    max_self: int
    max_query: int
    max_key: int
    first_query: int
    num_queries: int
    num_keys: int

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}

    def to(self, device: torch.device | str | None) -> AttentionRanges:
        """The same ranges on `device`."""
        moved: dict[str, Any] = {name: _moved(x, device) for name, x in self.tensors().items()}
        return replace(self, **moved)


class PackedLayout:
    """The layout of P prompts and their S completions, T tokens in all, N of them in completions.

    prompt_lengths:     [P_1, P_2, ...] in tokens, each >= 1: the last prompt token predicts the first completion token.
    completion_lengths: [[c_11, c_12, ...], ...], one list per prompt, each length >= 0; a list may be empty.
    device:             where the tensors live; the CPU by default.

    num_tokens, num_prompt_tokens, num_completion_tokens: T, T - N, N.
    position_ids:    [T] int64; each completion goes on from its prompt's length.
    predictor_index: [N] int64, the row whose hidden state predicts each completion token: the prompt's last token for
                     the first one, the token before for the others.
    cu_seqlens:      [S+1] int32; completion s owns rows cu_seqlens[s]:cu_seqlens[s+1] of the N.
    attention:       the ranges that `shared_prefix_attention` works on.
    longest:         the most tokens that a prompt and one of its completions have together.

    Errors: TypeError for lengths that are not integers, ValueError for lengths out of range, lists that do not match,
    or more than 2^31 - 1 tokens.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
    ) -> None:
        self.prompt_lengths = _lengths("prompt_lengths", prompt_lengths, minimum=1)
        _check_list("completion_lengths", completion_lengths, "lists of ints")
        self.completion_lengths = tuple(
            _lengths(f"completion_lengths[{i}]", lengths, minimum=0) for i, lengths in enumerate(completion_lengths)
        )
        if len(self.prompt_lengths) != len(self.completion_lengths):
            raise ValueError(
                f"completion_lengths: expected one list per prompt, {len(self.prompt_lengths)} in all, "
                f"got {len(self.completion_lengths)}"
            )
        lengths = [length for group in self.completion_lengths for length in group]
        self.num_prompt_tokens = sum(self.prompt_lengths)
        self.num_completion_tokens = sum(lengths)
        self.num_tokens = self.num_prompt_tokens + self.num_completion_tokens
        self.longest = max(
            (p + max(group, default=0) for p, group in zip(self.prompt_lengths, self.completion_lengths, strict=True)),
            default=0,
        )
        if self.num_tokens >= 2**31:
            raise ValueError(f"PackedLayout: expected fewer than 2^31 tokens, got {self.num_tokens}")

        with torch.device("cpu"):  # whatever the default: sizes are read here
            self.position_ids = self._positions()
            self.attention = self._attention()
        self._move(device)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout on `device`; from the CPU to a GPU without waiting for either."""
        moved = copy.copy(self)
        moved._move(device)
        return moved

    def tensors(self) -> list[Tensor]:
        """Those that attention reads, for whoever has to keep them alive."""
        return list(self.attention.tensors().values())

    def _move(self, device: torch.device | str | None) -> None:
        for name in ("predictor_index", "cu_seqlens"):  # made on the device they are asked for on
            self.__dict__.pop(name, None)
        self.attention = self.attention.to(device)
        self.position_ids = self.attention.position_ids

    @cached_property
    def predictor_index(self) -> Tensor:
        """[N] int64; see the class."""
        with torch.device("cpu"):
            prompt_length, group_size, completion_length = self._sizes()
            owner_last_row = (prompt_length.cumsum(0) - 1).repeat_interleave(group_size)
            predictor = torch.arange(self.num_prompt_tokens, self.num_tokens) - 1
            starts = completion_length > 0
            predictor[_starts(completion_length)[starts]] = owner_last_row[starts]
        return _moved(predictor, self.position_ids.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[S+1] int32; see the class."""
        bounds = _bounds([length for group in self.completion_lengths for length in group])
        return _moved(torch.tensor(bounds, dtype=torch.int32, device="cpu"), self.position_ids.device)

    def _sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of each prompt, its completions' number, tokens of each completion: int64."""
        lengths = [length for group in self.completion_lengths for length in group]
        sizes = [len(group) for group in self.completion_lengths]
        prompts, groups, completions = (
            torch.tensor(x, dtype=torch.int64) for x in (self.prompt_lengths, sizes, lengths)
        )
        return prompts, groups, completions

    def _positions(self) -> Tensor:
        prompt_length, group_size, completion_length = self._sizes()
        before = prompt_length.repeat_interleave(group_size).repeat_interleave(completion_length)
        return torch.cat([_offsets(prompt_length), _offsets(completion_length) + before])

    def _attention(self) -> AttentionRanges:
        """The ranges; their sizes are host integers, so that no kernel's launch has to wait for them."""
        groups = [[length for length in group if length] for group in self.completion_lengths]
        sequences = [*self.prompt_lengths, *(length for group in groups for length in group)]
        if groups and len(groups[-1]) == 1 and not any(groups[:-1]):
            sequences = [*self.prompt_lengths[:-1], self.prompt_lengths[-1] + groups[-1][0]]
            groups[-1] = []
        queries = [sum(group) for group in groups]
        while queries and not queries[-1]:
            queries.pop()
        keys = list(self.prompt_lengths[: len(queries)])
        key_bounds = _bounds(keys)
        unasked = [
            row
            for i, (asked, length) in enumerate(zip(queries, keys, strict=True))
            if not asked
            for row in range(key_bounds[i], key_bounds[i] + length)
        ]
        cu_self, cu_query, cu_key = (
            torch.tensor(x, dtype=torch.int32) for x in (_bounds(sequences), _bounds(queries), key_bounds)
        )
        return AttentionRanges(
            self.position_ids, cu_self, cu_query, cu_key, torch.tensor(unasked, dtype=torch.int64),
            max_self=max(sequences, default=0), max_query=max(queries, default=0), max_key=max(keys, default=0),
            first_query=self.num_prompt_tokens, num_queries=sum(queries), num_keys=sum(keys),
        )  # fmt: skip

    @property
    def shares(self) -> bool:
        """Is there any completion, to share a prompt?"""
        return any(self.completion_lengths)

    def __repr__(self) -> str:
        return f"PackedLayout({list(self.prompt_lengths)}, {[list(group) for group in self.completion_lengths]})"


def _moved(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Out of pinned memory a copy to a GPU runs beside the host; the allocator keeps the memory until it has run."""
    to_gpu = device is not None and torch.device(device).type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if to_gpu else x.to(device)


def _check_list(name: str, value: Any, of: str) -> None:
    if not isinstance(value, Iterable) or hasattr(value, "dtype"):  # of a GPU's tensor each element would be a wait
        hint = "; `tolist()` makes one" if hasattr(value, "dtype") else ""
        raise TypeError(f"{name}: expected a list of {of}, got {type(value).__name__}{hint}")


def _lengths(name: str, lengths: Sequence[int], minimum: int) -> tuple[int, ...]:
    _check_list(name, lengths, "ints")
    lengths = tuple(lengths)  # an iterator can be read once
    for i, length in enumerate(lengths):
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"{name}[{i}]: expected an int, got {type(length).__name__}")
        if length < minimum:
            raise ValueError(f"{name}[{i}]: expected a length >= {minimum}, got {length}")
    return lengths


def _bounds(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _offsets(lengths: Tensor) -> Tensor:
    """0, 1, ..., length - 1 for each length, one after the other."""
    return torch.arange(int(lengths.sum())) - _starts(lengths).repeat_interleave(lengths)
