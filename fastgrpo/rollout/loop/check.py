"""Can this model be decoded over our own keys and values? Asked once, by comparing logits with its own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo.layers import Body, StockBody
from fastgrpo.rollout.loop.cache import Group, Row, SlabCache, causal
from fastgrpo.rollout.loop.decoder import Cache, forward
from fastgrpo.rollout.loop.slabs import KeyShape

# Largest difference of the logits, relative to the largest one; the model's own attention takes its softmax in fp32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@torch.no_grad()
def why_not(model: Any) -> tuple[KeyShape | None, str | None]:
    """What is kept per token, or why the model cannot be decoded so. The model is in eval mode."""
    probe = _Probe()
    try:
        shape, reason = probe.ask(model)
        if shape is not None and reason is None:
            cache = SlabCache(shape, rows=3, longest_prompt=5, longest_completion=3)
            reason = compare(model, StockBody(model), cache)
    except Exception as error:  # whatever a model does that was not made for this: the plain loop runs it
        reason = f"{type(error).__name__}: {error}"
    return (shape, None) if reason is None else (None, reason)


class _Probe:
    """Stands in for attention once and writes down what every layer brings."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.layers: list[int] = []
        self.windows = 0
        self.dtypes: set[torch.dtype] = set()

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        self.layers.append(module.layer_idx)
        self.shapes += [(key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])]
        self.dtypes |= {key.dtype, value.dtype}
        self.windows += sliding_window is not None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal(q, k, v, scale, sliding_window, softcap)

    def ask(self, model: Any) -> tuple[KeyShape | None, str | None]:
        config = model.config.get_text_config()
        device = next(model.parameters()).device
        StockBody(model)(self, _tokens(model, 4), torch.arange(4, device=device))
        if not self.layers:
            return None, f"its attention ({config._attn_implementation}) does not take attend="
        if self.layers != list(range(len(self.layers))):
            return None, "its layers do not call attention once each, in order"
        if len(set(self.shapes)) > 1 or len(self.dtypes) > 1:
            return None, "its layers, or keys and values, are of several sizes"
        types = getattr(config, "layer_types", None) or []
        if unknown := sorted(set(types) - _KNOWN_LAYERS):
            return None, f"its layers of type {', '.join(unknown)} are not plain attention"
        claimed = list(types).count("sliding_attention")
        if not types and getattr(config, "sliding_window", None):
            claimed = len(self.layers)
        if claimed > self.windows:
            return None, "its sliding windows are in its masks alone, and attention is not told of them"
        heads, size = self.shapes[0]
        return KeyShape(len(self.layers), heads, size, self.dtypes.pop(), device), None


@torch.no_grad()
def compare(model: Any, body: Body, cache: Cache) -> str | None:
    """How logits over this cache differ from the model's own full forwards, or None: two prompts, three completions.

    The cache has room for 3 rows, prompts of 5 tokens and completions of 3.
    """
    ids = _tokens(model, 14).tolist()
    prompts, own = [ids[:5], ids[5:8]], [ids[8:11], ids[10:13], ids[11:14]]
    groups = [Group(token_ids=p) for p in prompts]
    rows = [Row(group=groups[g], sample=i, slot=i) for i, g in enumerate((0, 1, 0))]
    cache.add_prompts(groups)
    found = list(zip(groups, forward(body, cache.step(groups), []), strict=True))
    differences = [_difference(logits, _alone(model, g.token_ids)[-1]) for g, logits in found]
    for turn in range(3):
        if turn < 2:  # the last row starts one step late
            for row in rows[:2] if turn == 0 else rows[2:]:
                cache.add_row(row)
        step = cache.step([])
        logits = forward(body, step, [own[r.sample][r.length - 1] for r in step.rows])
        for row, given in zip(step.rows, logits, strict=True):
            alone = _alone(model, row.group.token_ids + own[row.sample][: row.length])
            differences.append(_difference(given, alone[-1]))
    worst = max(differences)
    dtype = next(model.parameters()).dtype
    if not worst <= _TOLERANCE.get(dtype, 0.1) or any(d != d for d in differences):
        return f"its logits over kept keys and values differ from a full forward's by {worst:.1e} of the largest"
    return None


def _alone(model: Any, ids: list[int]) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1.0)).item()


def _tokens(model: Any, count: int) -> Tensor:
    """Some token ids, all different where the vocabulary is large enough."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, count + 1, device=next(model.parameters()).device) * 7919 % vocabulary
