"""Decoding with transformers' own cache, for models that cannot do without: compressed keys, other attention, ...

A batch of prompts is prefilled once for all their samples, then grows token by token. Finished rows leave once half of
the batch is idle. Not done here: refilling from waiting prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrpo.records import Sampling
from fastgrpo.rollout.loop.sampling import sample, uniforms
from fastgrpo.rollout.stopping import Stopping


@dataclass
class PlainRow:
    """What a sample got so far."""

    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def _cache_name(model: Any) -> str:
    """What the forward calls its cache: `cache` since transformers 5.24, which warns of the name before."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(causal_lm.forward).parameters else "past_key_values"


def _cache_of(output: Any) -> Any:
    cache = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if cache is None else cache


@torch.no_grad()
def decode_plainly(
    model: Any,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    stopping: Stopping,
    batch_size: int,
    ended: Callable[[PlainRow, bool], None],
    check: Callable[[], None],
) -> None:
    """As `Decoder.run`; a group larger than `batch_size` still goes together.

    Raises ValueError for a model without such a cache.
    """
    # Neighbours in length share a batch: less padding. The sort is stable, so the result is repeatable.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // n)
    for start in range(0, len(order), per_batch):
        chunk = order[start : start + per_batch]
        rows = [PlainRow(i * n + k) for i in chunk for k in range(n)]
        places = [sampling.first_group + i for i in chunk]
        draws = torch.cat([uniforms(sampling.seed, place, n, sampling.max_tokens) for place in places])
        batch = _Batch.prefill(model, [prompts[i] for i in chunk], n)
        _decode(model, batch, rows, draws, sampling, stopping, ended, check)


def _decode(
    model: Any,
    batch: _Batch,
    rows: list[PlainRow],
    draws: Tensor,
    sampling: Sampling,
    stopping: Stopping,
    ended: Callable[[PlainRow, bool], None],
    check: Callable[[], None],
) -> None:
    draws = draws.to(batch.logits.device)
    live = list(range(len(rows)))  # places in the batch; rows that ended go on being sampled until they leave
    for step in range(sampling.max_tokens):
        check()
        tokens, logprobs = sample(batch.logits, draws[:, step], sampling)
        drawn, their_logprobs = tokens.tolist(), logprobs.tolist()
        still = []
        for i in live:
            rows[i].tokens.append(drawn[i])
            rows[i].logprobs.append(their_logprobs[i])
            by_itself = stopping.ended(rows[i].tokens)
            if by_itself or step + 1 == sampling.max_tokens:
                ended(rows[i], by_itself)
            else:
                still.append(i)
        live = still
        if not live:
            break
        if len(live) <= len(rows) // 2:
            keep = torch.tensor(live, device=tokens.device)
            batch.keep(keep)
            tokens, draws, rows, live = tokens[keep], draws[keep], [rows[i] for i in live], list(range(len(live)))
        batch.advance(model, tokens)


@dataclass
class _Batch:
    """The sequences being decoded.

    cache: keys and values, called cache_name by the forward; logits [B, V] of the next token; mask [B, T] or None
    without padding; position [B] of the next token.
    """

    cache: Any
    cache_name: str
    logits: Tensor
    mask: Tensor | None
    position: Tensor

    @classmethod
    def prefill(cls, model: Any, prompts: list[list[int]], n: int) -> _Batch:
        """Run the prompts once, padded on the left, and repeat the result for the group."""
        from transformers import DynamicCache

        device, cache_name = next(model.parameters()).device, _cache_name(model)
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        padding = (longest - lengths)[:, None]
        step = torch.arange(longest)
        mask = None if not padding.any() else (step >= padding).long().to(device)
        output = model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(step - padding).clamp(min=0).to(device),
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: DynamicCache(config=model.config)},
        )
        cache = _cache_of(output)
        if cache is None or not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            raise ValueError(
                f"the loop engine cannot decode {type(model).__name__}: what it keeps of a prompt is not only keys and "
                "values, and cannot be repeated for the prompt's completions"
            )
        cache.batch_repeat_interleave(n)
        return cls(
            cache=cache,
            cache_name=cache_name,
            logits=output.logits[:, -1].repeat_interleave(n, 0),
            mask=None if mask is None else mask.repeat_interleave(n, 0),
            position=lengths.to(device).repeat_interleave(n),
        )

    def keep(self, rows: Tensor) -> None:
        """Let all other rows go."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self.position = self.position[rows]

    def advance(self, model: Any, token: Tensor) -> None:
        """Feed one token per row, [B], and take the logits of the next."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
        output = model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.cache, self.logits = _cache_of(output), output.logits[:, -1]
        self.position = self.position + 1
