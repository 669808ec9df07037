"""Decoding on a GPU: several tokens per row between two looks of the host, each step one replay of a CUDA graph.

What a step reads and writes is in tensors that stay: the rows' state, their random numbers, keys and values. Graphs are
captured per number of rows, when one is first needed, and live on with all of that in a `Session`, from one `generate`
to the next, as long as it fits. A model that cannot be captured runs the same steps without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.layers import Body
from fastgrpo.records import Sampling
from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.decoder import Decoder, Ended
from fastgrpo.rollout.loop.sampling import sample
from fastgrpo.rollout.loop.slabs import KeyShape
from fastgrpo.rollout.loop.slots import BURST, SlotCache, SlotStep, free_bytes, groups_at_once, rows_within, slot_bytes
from fastgrpo.rollout.stopping import Stopping

# A row's state: its newest token, its prompt's place and length, its own place and how many of its tokens are kept, and
# its slot, where its random numbers are.
_TOKEN, _WHERE, _LENGTH, _SLOT, _STATE = 0, slice(1, 5), 4, 5, 6

# Room for prompts comes in steps: the next batch's longest one is rarely as long as this one's.
_STEP = 128
# Prompt tokens of one step in half precision.
_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Plan:
    """What one `generate` wants: all that its steps depend on, whatever session serves it.

    rows: completions at once; groups: prompts kept at once. addresses: of the weights, which captured steps read;
    adapters: the active and the merged ones, by layer.
    """

    rows: int
    groups: int
    longest_prompt: int
    max_tokens: int
    drawing: tuple[float, int, float, float]
    addresses: tuple[int, ...]
    adapters: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, model: Any, rows: int, n: int, longest_prompt: int, sampling: Sampling) -> Plan:
        """For `rows` completions at once, `n` of a prompt."""
        return cls(
            rows,
            groups_at_once(rows, n),
            room_for(longest_prompt),
            sampling.max_tokens,
            (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
            tuple(parameter.data_ptr() for parameter in model.parameters()),
            tuple(
                (m.disable_adapters, *m.active_adapters, None, *m.merged_adapters)
                for m in model.modules()
                if hasattr(m, "merged_adapters")
            ),
        )

    @property
    def longest(self) -> int:
        """`SlotStep.longest`, coarsely: few captured steps do for all lengths."""
        return 1 << (self.longest_prompt + self.max_tokens + BURST - 1).bit_length()

    def serves(self, other: Plan) -> bool:
        """Has it room for the other, whose tokens are drawn alike, from the same weights and adapters?"""
        mine, theirs = ((p.drawing, p.addresses, p.adapters) for p in (self, other))
        sizes = [(p.rows, p.groups, p.longest_prompt, p.max_tokens) for p in (self, other)]
        return mine == theirs and all(a >= b for a, b in zip(*sizes, strict=True))

    def grown(self, other: Plan) -> Plan:
        """The other, with this one's room where that is more: lengths creep up, and each time graphs are lost."""
        return replace(
            other,
            rows=max(self.rows, other.rows),
            groups=max(self.groups, other.groups),
            longest_prompt=max(self.longest_prompt, other.longest_prompt),
            max_tokens=max(self.max_tokens, other.max_tokens),
        )

    def within(self, free: int | None, shape: KeyShape, n: int) -> Plan:
        """This one, or with fewer rows, `n` of a prompt, if `free` bytes (None = enough) do not hold it."""
        if free is None or slot_bytes(shape, self.rows, self.groups, self.longest_prompt, self.max_tokens) <= free:
            return self
        rows = rows_within(free, shape, self.rows, n, self.longest_prompt, self.max_tokens)
        return replace(self, rows=rows, groups=groups_at_once(rows, n))


@dataclass
class Session:
    """Keys and values, random numbers [slots, tokens], and the bursts made so far, by their rows and longest paths.

    asked:  what it was made for; plan: what memory allows of that.
    reason: why steps are not captured in CUDA graphs; None when they are.
    """

    asked: Plan
    plan: Plan
    cache: SlotCache
    uniforms: Tensor
    reason: str | None
    bursts: dict[tuple[int, int], Burst] = field(default_factory=dict)
    stream: Any = None  # where captures are made
    memory: Any = None  # one pool for all graphs: only one runs at a time

    @classmethod
    def make(cls, wanted: Plan, shape: KeyShape, n: int, before: Plan | None = None) -> Session:
        """Allocate it, for `n` completions of a prompt. Raises torch.cuda.OutOfMemoryError.

        before: what the session that it replaces was made for; room for that stays, if there is memory.
        """
        on_gpu = shape.device.type == "cuda"
        free = free_bytes(shape.device) if on_gpu else None
        asked = wanted if before is None else before.grown(wanted)
        plan = asked.within(free, shape, n)
        if plan != asked:
            asked, plan = wanted, wanted.within(free, shape, n)
        cache = SlotCache(
            shape,
            rows=plan.rows,
            groups=plan.groups,
            longest_prompt=plan.longest_prompt,
            longest_completion=plan.max_tokens,
        )
        uniforms = torch.zeros(plan.rows, plan.max_tokens + BURST, dtype=torch.float64, device=shape.device)
        if not on_gpu:
            return cls(asked, plan, cache, uniforms, "CUDA graphs are for GPUs")
        stream, memory = torch.cuda.Stream(shape.device), torch.cuda.graph_pool_handle()
        return cls(asked, plan, cache, uniforms, None, stream=stream, memory=memory)

    def burst(self, body: Body, sampling: Sampling, rows: int, longest: int) -> Burst:
        """One for at least so many rows, of paths up to `longest`."""
        key = bucket(rows), longest
        if key not in self.bursts:
            self.bursts[key] = burst = Burst(body, self.cache, sampling, self.uniforms, *key)
            if self.stream is not None:
                try:
                    burst.capture(self.stream, self.memory)
                except torch.cuda.OutOfMemoryError as error:  # others may fit
                    self.reason = str(error)
                except RuntimeError as error:  # what the model does in its forward cannot be captured
                    cause = error.__context__ or error  # the end of a capture that failed fails, too
                    self.reason, self.stream = f"{type(cause).__name__}: {cause}", None
        return self.bursts[key]


class Burst:
    """`size` rows in static tensors: their state, and the tokens and log-probs that come of it."""

    def __init__(
        self, body: Body, cache: SlotCache, sampling: Sampling, uniforms: Tensor, size: int, longest: int
    ) -> None:
        device = cache.shape.device
        self.body, self.sampling, self.uniforms = body, sampling, uniforms
        self.state = torch.zeros(_STATE, size, dtype=torch.int64, device=device)
        self.step = SlotStep(cache, self.state[_WHERE], longest)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(BURST, size, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(BURST, size, device=device)
        self.graph: Any = None

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """BURST tokens more for the rows of `state` [_STATE, m], which is moved on: tokens, log-probs [BURST, m]."""
        rows = state.shape[1]
        self.state[:, rows:].zero_()  # those that only fill up: nobody looks at what they draw
        self.state[:, :rows] = state
        self.turn.zero_()
        for _ in range(BURST):
            if self.graph is None:
                self.advance()
            else:
                self.graph.replay()
        state.copy_(self.state[:, :rows])
        return self.tokens[:, :rows], self.logprobs[:, :rows]

    def advance(self) -> None:
        """One token more for every row; nothing here depends on a value, so it can be captured."""
        tokens, logprobs = draw(self.body, self.step, self.state, self.uniforms, self.sampling)
        self.tokens.index_copy_(0, self.turn, tokens[None])
        self.logprobs.index_copy_(0, self.turn, logprobs[None])
        self.turn.add_(1)

    def capture(self, stream: Any, memory: Any) -> None:
        """Capture `advance`, tried out before on rows that are nobody's.

        Other threads may use the GPU meanwhile, as rewards do. A capture that fails leaves its stream behind as the
        current one: the outer context puts back what was.
        """
        current = torch.cuda.current_stream(self.state.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.advance()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"),
        ):
            self.advance()
        self.graph = graph


def draw(
    body: Body, step: SlotStep, state: Tensor, uniforms: Tensor, sampling: Sampling, groups: list[Group] | None = None
) -> tuple[Tensor, ...]:
    """A token and its log-prob for every row, [b] each, and the rows' state moved on; no host sync without groups.

    groups: prompts of the step, whose last logits [groups, V] are then returned, too.
    """
    rows = state.shape[1]
    ids, positions = state[_TOKEN], state[_WHERE][1] + state[_LENGTH]
    keep: Tensor | int = 0
    if groups:
        lengths = torch.tensor([group.length for group in groups])
        prompts = torch.tensor([token for group in groups for token in group.token_ids])
        last = torch.cat([torch.arange(rows), rows + lengths.cumsum(0) - 1])
        ids = torch.cat([ids, prompts.to(ids.device)])
        positions = torch.cat([positions, step.layout.position_ids])
        keep = last.to(ids.device)
    logits = body(step, ids, positions, keep)
    tokens, logprobs = sample(logits[:rows], uniforms[state[_SLOT], state[_LENGTH] + 1], sampling)
    state[_TOKEN].copy_(tokens)
    state[_LENGTH].add_(1)
    return (tokens, logprobs, logits[rows:]) if groups else (tokens, logprobs)


class SlotDecoder(Decoder):
    """`Decoder` over a `Session`: steps that bring prompts run as they are, all others in bursts.

    Tokens stay in arrays, not in the rows, until a row that ended is told of: between a burst and the next launch the
    GPU waits, so the host then does only what that launch needs.
    """

    cache: SlotCache

    def __init__(self, body: Body, session: Session, plan: Plan, sampling: Sampling, stopping: Stopping) -> None:
        batch_size = min(plan.rows, session.plan.rows)
        super().__init__(body, session.cache, sampling, stopping, batch_size, session.uniforms)
        self.longest = plan.longest
        self.groups = min(plan.groups, session.plan.groups)  # a session may have room for more
        self.session = session
        self.prefill_tokens = tokens_at_once(session.cache.shape.dtype)
        self.refill = batch_size // 8
        # Of the cache's rows, in order, but for new ones behind the others; and how many tokens each has.
        self.state = torch.zeros(_STATE, 0, dtype=torch.int64, device=self.device)
        self.slots = self.counts = np.zeros(0, dtype=np.int64)
        self.tokens = np.zeros((batch_size, sampling.max_tokens + BURST), dtype=np.int64)
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)
        self.unread: list[tuple[Row, int]] = []  # have ended; as many tokens of theirs are in the arrays
        self._ends, self._candidates = _table(stopping.tokens), _table(stopping.candidates)

    def _next_prompts(self, waiting: deque[Group], n: int) -> list[Group]:
        # A step that brings prompts is not captured, and slow for all rows: it waits until it fills many slots.
        if self.cache.rows and len(self.free) < self.refill:
            return []
        return super()._next_prompts(waiting, n)

    def _fits(self, groups: list[Group]) -> bool:
        return super()._fits(groups) and self.cache.kept + len(groups) <= self.groups

    def _turn(self, groups: list[Group], ended: Ended) -> list[Row]:
        fresh = self._join()
        if groups:
            step = SlotStep(self.cache, self.state[_WHERE], self.longest, groups)
            tokens, logprobs, logits = draw(self.body, step, self.state, self.uniforms, self.sampling, groups)
            self._make_ready(groups, logits)
            tokens, logprobs = tokens[None], logprobs[None]
        else:
            burst = self.session.burst(self.body, self.sampling, len(self.slots), self.longest)
            tokens, logprobs = burst.run(self.state)
        # Not awaited, and so into pinned memory.
        tokens, logprobs = (x.to("cpu", non_blocking=True) for x in (tokens, logprobs))
        self._deliver(ended)
        for row in fresh:  # not before: their slots may be those of rows that have just been told of
            self.tokens[row.slot, 0], self.logprobs[row.slot, 0] = row.tokens[0], row.logprobs[0]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self._keep(tokens.numpy(), logprobs.numpy())

    def _deliver(self, ended: Ended) -> None:
        for row, count in self.unread:
            row.tokens = self.tokens[row.slot, :count].tolist()
            row.logprobs = self.logprobs[row.slot, :count].tolist()
        self.unread = []
        super()._deliver(ended)

    def _join(self) -> list[Row]:
        """The cache's new rows, which come behind the others."""
        fresh = self.cache.rows[len(self.slots) :]
        if fresh:
            state = [[r.tokens[0], r.group.start, r.group.length, r.start, 0, r.slot] for r in fresh]
            columns = torch.tensor(state, dtype=torch.int64).T.to(self.device)
            self.state = torch.cat([self.state, columns], 1)
            self.slots = np.concatenate([self.slots, np.array([row.slot for row in fresh], dtype=np.int64)])
            self.counts = np.concatenate([self.counts, np.ones(len(fresh), dtype=np.int64)])
        return fresh

    def _keep(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[Row]:
        """Tokens and log-probs [turns, rows], those behind a row's end included; the rows that have ended."""
        columns = self.counts + np.arange(len(tokens))[:, None]
        self.tokens[self.slots, columns], self.logprobs[self.slots, columns] = tokens, logprobs
        by_itself = self._ends.take(tokens, mode="clip")
        if self.stopping.candidates:
            for turn, i in np.argwhere(self._candidates.take(tokens, mode="clip")):
                end = columns[turn, i] + 1
                tail = self.tokens[self.slots[i], max(0, end - self.stopping.tail) : end]
                by_itself[turn, i] |= self.stopping.ended(tail.tolist())
        last = by_itself | (columns + 1 >= self.sampling.max_tokens)
        over = last.any(0)
        ends = np.flatnonzero(over)
        finished = [self.cache.rows[i] for i in ends.tolist()]
        turns = last[:, ends].argmax(0)
        self.unread += zip(finished, (columns[turns, ends] + 1).tolist(), strict=True)
        for row, alone in zip(finished, by_itself[turns, ends].tolist(), strict=True):
            self._end(row, alone)
        self.counts = self.counts + len(tokens)
        if finished:
            self._leave(finished, np.flatnonzero(~over))
        return finished

    def _leave(self, finished: list[Row], others: np.ndarray) -> None:
        """Rows that have ended; the places of the others."""
        self.cache.remove(finished)
        self.state = self.state[:, torch.from_numpy(others).to(self.device)]
        self.slots, self.counts = self.slots[others], self.counts[others]


def _table(tokens: Collection[int]) -> np.ndarray:
    """Is a token one of them? To be asked with mode="clip": the last entry is that of all larger ones."""
    table = np.zeros(max(tokens, default=-1) + 2, dtype=bool)
    table[list(tokens)] = True
    return table


def room_for(longest_prompt: int) -> int:
    """Tokens that are kept free for every prompt."""
    return -(-longest_prompt // _STEP) * _STEP


def tokens_at_once(dtype: torch.dtype) -> int:
    """Prompt tokens of a step. Only in half precision does attention make no scores of them."""
    return _PREFILL_TOKENS if dtype.itemsize == 2 else Decoder.prefill_tokens


def bucket(rows: int) -> int:
    """Rows of the burst that runs so many: powers of two, and one and a half times those."""
    size = 1 << (rows - 1).bit_length()
    return size * 3 // 4 if size > 2 and rows <= size * 3 // 4 else size
