"""Decoding on a GPU: several tokens per row between two looks of the host, each step one replay of a CUDA graph.

Graphs are captured per number of rows, powers of two, and live as long as one `generate`: whatever happens to weights
or pages between two of them, no graph is stale. A model that cannot be captured runs the same steps without.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from fastgrpo.records import Sampling
from fastgrpo.rollout.loop.cache import Group, Row
from fastgrpo.rollout.loop.decoder import Decoder, Ended
from fastgrpo.rollout.loop.paged import PAGE, PagedCache, PagedStep
from fastgrpo.rollout.loop.sampling import sample

# Tokens of every row between two looks at which rows have ended. Half of them are wasted on a row that ends.
BURST = 8


class Burst:
    """`size` rows in static tensors: tokens, positions, pages, and where in their random numbers they stand."""

    def __init__(self, model: Any, cache: PagedCache, sampling: Sampling, uniforms: Tensor, size: int) -> None:
        device = cache.shape.device
        self.model, self.sampling, self.uniforms = model, sampling, uniforms
        # Token, position, slot and count of each row; `load` writes them all.
        self.state = torch.zeros(4, size, dtype=torch.int64, device=device)
        table = torch.zeros(size, cache.width, dtype=torch.int32, device=device)
        used = torch.ones(size, dtype=torch.int32, device=device)
        where = torch.zeros(size, dtype=torch.int64, device=device)
        self.step = PagedStep(cache, table, used, where, [], [])
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(BURST, size, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(BURST, size, device=device)
        self.graph: Any = None

    def load(self, rows: list[Row], table: Tensor) -> None:
        """Take these rows; those that only fill up the batch write to page 0 and are not looked at."""
        state = [
            [row.tokens[-1] for row in rows],
            [row.group.length + row.length for row in rows],
            [row.slot for row in rows],
            [len(row.tokens) for row in rows],
        ]
        count = len(rows)
        self.state.zero_()
        self.state[:, :count] = torch.tensor(state, device=self.state.device)
        self.step.table.zero_()
        self.step.table[:count] = table.to(self.state.device)
        self.step.used.copy_(self.state[1] + 1)
        self.turn.zero_()

    def run(self, turns: int) -> None:
        """So many tokens more for every row, into `tokens` and `logprobs`, without waiting for the device."""
        for _ in range(turns):
            if self.graph is None:
                self.advance()
            else:
                self.graph.replay()

    def advance(self) -> None:
        """One token more for every row; nothing here depends on a value, so it can be captured."""
        ids, positions, slots, counts = self.state
        page = self.step.table.gather(1, (positions // PAGE)[:, None]).squeeze(1)
        self.step.where.copy_(page.long() * PAGE + positions % PAGE)
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self.mask,
            use_cache=False,
            attend=self.step,
        )
        tokens, logprobs = sample(output.logits[0], self.uniforms[slots, counts], self.sampling)
        self.tokens.index_copy_(0, self.turn, tokens[None])
        self.logprobs.index_copy_(0, self.turn, logprobs[None])
        ids.copy_(tokens)
        positions.add_(1)
        counts.add_(1)
        self.step.used.add_(1)
        self.turn.add_(1)

    def capture(self, memory: Any) -> None:
        """Capture `advance`. Call `load` after it: trying it out moves the state on."""
        device = self.state.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self.advance()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self.advance()
        self.graph = graph


class PagedDecoder(Decoder):
    """`Decoder` over a `PagedCache`: steps that bring prompts run as they are, all others in bursts.

    reason: why steps are not captured in CUDA graphs; None when they are.
    """

    cache: PagedCache

    def __init__(self, model: Any, cache: PagedCache, sampling: Sampling, ends: set[int], batch_size: int) -> None:
        super().__init__(model, cache, sampling, ends, batch_size)
        self.uniforms = torch.zeros(
            batch_size, sampling.max_tokens + BURST, dtype=torch.float64, device=cache.shape.device
        )
        self.refill = batch_size // 8
        self.bursts: dict[int, Burst] = {}
        self.reason: str | None = None if cache.shape.device.type == "cuda" else "CUDA graphs are for NVIDIA GPUs"
        self._memory = torch.cuda.graph_pool_handle() if self.reason is None else None

    def _next_prompts(self, waiting: deque[Group], n: int) -> list[Group]:
        # A step that brings prompts is not captured, and slow for all rows: it waits until it fills many slots.
        if self.cache.rows and len(self.free) < self.refill:
            return []
        return super()._next_prompts(waiting, n)

    def _turn(self, groups: list[Group], ended: Ended) -> list[Row]:
        rows = list(self.cache.rows)
        if groups or not rows:
            return super()._turn(groups, ended)
        burst = self._burst(len(rows))
        burst.load(rows, self.cache.table(rows))
        burst.run(BURST)
        tokens, logprobs = burst.tokens.tolist(), burst.logprobs.tolist()
        finished = []
        for i, row in enumerate(rows):
            row.length += BURST
            if any(self._take(row, tokens[t][i], logprobs[t][i], ended) for t in range(BURST)):
                finished.append(row)
        self.cache.remove(finished)
        return finished

    def _burst(self, rows: int) -> Burst:
        size = 1 << (rows - 1).bit_length()
        if size not in self.bursts:
            burst = Burst(self.model, self.cache, self.sampling, self.uniforms, size)
            if self.reason is None:
                try:
                    burst.capture(self._memory)
                except RuntimeError as error:  # what the model does in its forward cannot be captured
                    self.reason = f"{type(error).__name__}: {error}"
            self.bursts[size] = burst
        return self.bursts[size]
