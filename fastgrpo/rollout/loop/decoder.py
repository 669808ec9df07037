"""Continuous batching: rows that end leave at once, waiting samples take their place, prompts join running steps.

Every forward is one packed row: a token of each live completion and, when there is room for more of them, the next
prompts. It never holds more than `batch_size` completions, whatever the number of prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.layers import Body
from fastgrpo.records import Sampling
from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.sampling import sample, uniforms
from fastgrpo.rollout.stopping import Stopping

Ended = Callable[[Row, bool], None]
"""Told of every completion that ended: its row, and whether it ended by itself."""


class Step(Protocol):
    """A forward that a cache has made room for: its rows in order, then its prompts; attention is handed to it."""

    @property
    def rows(self) -> Sequence[Row]: ...

    @property
    def groups(self) -> Sequence[Group]: ...


class Cache(Protocol):
    """Where keys and values are: `SlabCache` or `SlotCache`, which say what each of these does."""

    def fits(self, groups: Sequence[Group]) -> bool: ...

    def add_prompts(self, groups: Sequence[Group]) -> None: ...

    def add_row(self, row: Row) -> None: ...

    def remove(self, rows: Sequence[Row]) -> None: ...

    def drop(self, groups: Iterable[Group]) -> None: ...

    def step(self, groups: Sequence[Group]) -> Step: ...


class Decoder:
    """Draws `n` completions of every prompt; sample i * n + k is the k-th of prompt i.

    body:       the forward of a model in eval mode.
    stopping:   what ends a completion.
    batch_size: completions alive at once.
    uniforms:   [batch_size, max_tokens] float64 at least, for the random numbers of rows; made on the CPU if None.
    """

    # Prompt tokens of one step, unless one prompt is longer: bounds the memory of the activations.
    prefill_tokens = 2048

    def __init__(
        self,
        body: Body,
        cache: Cache,
        sampling: Sampling,
        stopping: Stopping,
        batch_size: int,
        uniforms: Tensor | None = None,
    ) -> None:
        self.body = body
        self.cache = cache
        self.sampling = sampling
        self.stopping = stopping
        self.device = body.device
        self.free = list(range(batch_size))[::-1]
        if uniforms is None:
            uniforms = torch.zeros(batch_size, sampling.max_tokens, dtype=torch.float64)
        self.uniforms = uniforms
        self.ready: deque[Group] = deque()
        self.pending: list[tuple[Row, bool]] = []  # have ended, but nobody was told yet

    @torch.no_grad()
    def run(self, prompts: Sequence[list[int]], n: int, ended: Ended, check: Callable[[], None]) -> None:
        """Decode everything; `ended` is called once per sample, in the order in which they end.

        A GPU does not wait for `ended`: it is called when the next forward has been launched.
        check: called before every forward; what it raises ends the decoding.
        """
        waiting = deque(
            Group(index=i, token_ids=ids, waiting=list(range(i * n, i * n + n))) for i, ids in enumerate(prompts)
        )
        live = 0
        while waiting or self.ready or live:
            check()
            live += self._start()
            groups = self._next_prompts(waiting, n)
            if live or groups:
                live -= len(self._turn(groups, ended))
        self._deliver(ended)

    def _turn(self, groups: list[Group], ended: Ended) -> list[Row]:
        """One forward: a token more for every row, and these prompts; the rows that have ended."""
        step = self.cache.step(groups)
        logits = forward(self.body, step, [row.tokens[-1] for row in step.rows])
        self._deliver(ended)
        rows = len(step.rows)
        self._make_ready(groups, logits[rows:])
        finished = self._draw(step.rows, logits[:rows]) if rows else []
        self.cache.remove(finished)
        return finished

    def _deliver(self, ended: Ended) -> None:
        """Tell of the rows that have ended."""
        pending, self.pending = self.pending, []
        for row, by_itself in pending:
            ended(row, by_itself)

    def _make_ready(self, groups: list[Group], logits: Tensor) -> None:
        """Prompts that have run; logits [groups, V] of the tokens after them."""
        for group, last in zip(groups, logits, strict=True):
            group.logits = last.clone()  # not a view, which would keep those of all rows
            place = self.sampling.first_group + group.index
            group.draws = uniforms(self.sampling.seed, place, len(group.waiting), self.sampling.max_tokens)
        self.ready += groups

    def _start(self) -> int:
        """Give free slots to waiting samples and draw their first tokens; how many rows that makes."""
        started = 0
        while self.free and self.ready:
            rows, logits, counts = [], [], []
            while self.free and self.ready:
                group = self.ready[0]
                assert group.logits is not None
                begun = self._begin(group)
                rows += begun
                logits.append(group.logits)
                counts.append(len(begun))
                if not group.waiting:
                    self.ready.popleft()
                    group.logits = group.draws = None
            each = torch.stack(logits).repeat_interleave(torch.tensor(counts, device=self.device), 0)
            finished = set(self._draw(rows, each))
            for row in rows:
                if row not in finished:
                    self.cache.add_row(row)
            self.cache.drop({r.group: None for r in finished if not r.group.alive and not r.group.waiting})
            started += len(rows) - len(finished)
        return started

    def _begin(self, group: Group) -> list[Row]:
        """Rows for as many of the group's waiting samples as there are slots."""
        assert group.draws is not None
        count = min(len(self.free), len(group.waiting))
        samples, group.waiting = group.waiting[:count], group.waiting[count:]
        rows = [Row(group=group, sample=i, slot=self.free.pop()) for i in samples]
        draws, group.draws = group.draws[:count], group.draws[count:]
        self.uniforms[[row.slot for row in rows], : draws.shape[1]] = draws.to(self.uniforms.device)
        group.alive += count
        return rows

    def _next_prompts(self, waiting: deque[Group], n: int) -> list[Group]:
        """As many prompts as have a free slot for a sample, under the budget of tokens; one may be over it."""
        chosen: list[Group] = []
        room, tokens = len(self.free), 0
        while waiting and room > 0 and not self.ready:
            tokens += len(waiting[0].token_ids)
            if (chosen and tokens > self.prefill_tokens) or not self._fits([*chosen, waiting[0]]):
                break
            chosen.append(waiting.popleft())
            room -= n
        self.cache.add_prompts(chosen)
        return chosen

    def _fits(self, groups: list[Group]) -> bool:
        return self.cache.fits(groups)

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> list[Row]:
        """Add a token to every row; the rows that have ended, whose slots are free again."""
        slots, counts = [row.slot for row in rows], [len(row.tokens) for row in rows]
        tokens, logprobs = sample(logits, self.uniforms[slots, counts].to(self.device), self.sampling)
        drawn = zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)
        return [row for row, token, logprob in drawn if self._take(row, token, logprob)]

    def _take(self, row: Row, token: int, logprob: float) -> bool:
        """Add a token to a row; has it ended?"""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        by_itself = self.stopping.ended(row.tokens)
        if not by_itself and len(row.tokens) < self.sampling.max_tokens:
            return False
        self._end(row, by_itself)
        return True

    def _end(self, row: Row, by_itself: bool) -> None:
        row.group.alive -= 1
        self.free.append(row.slot)
        self.pending.append((row, by_itself))


def forward(body: Body, step: Step, tokens: list[int]) -> Tensor:
    """Logits [rows + prompts, V] of the next tokens. tokens: the newest one of each row, in the step's order."""
    ids = list(tokens)
    positions = [row.group.length + row.length - 1 for row in step.rows]
    last = list(range(len(ids)))
    for group in step.groups:
        ids += group.token_ids
        positions += range(group.length)
        last.append(len(ids) - 1)
    ids, positions, last = torch.tensor([ids, positions, last + [0] * (len(ids) - len(last))], device=body.device)
    return body(step, ids, positions, last[: len(step.rows) + len(step.groups)] if step.groups else 0)
