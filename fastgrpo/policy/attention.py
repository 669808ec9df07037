"""Attention over packed sequences, registered with transformers under the name "fastgrpo".

A packed forward passes `packed=` to the model, a `Packed`: which rows are which prompt and completion. transformers
hands that keyword to every layer's attention, also under gradient checkpointing. Without it (ordinary generation) the
call is transformers' own sdpa.

Packed rows go through `fastgrpo_kernels`' shared_prefix_attention, on views, whether or not they share prompts. What it
cannot do, or only slowly (dropout; a softcap or fp32 on most machines), is refused for shared prompts; otherwise
sequences of like length are gathered into one padded call of torch's scaled_dot_product_attention. With the padding on
the right, causality alone keeps real tokens from seeing it, so the result is exact and needs no mask.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo_kernels import PackedLayout, shared_prefix_attention, why_not_flash

NAME = "fastgrpo"

# A bucket holds sequences no shorter than this share of its longest: bounds the padding, and the number of calls.
_BUCKET_RATIO = 0.75


class Packed:
    """What every layer's attention is told, and what the layers that need it share.

    layout:  the prompts and completions, on the device of the model.
    longest: the longest sequence that a sliding window must not cut; by default the longest one here.
    windows: a list, to be told the sliding window of every call of attention; the self-check asks.
    """

    def __init__(self, layout: PackedLayout, longest: int = 0) -> None:
        self.layout = layout
        self.longest = max(longest, layout.longest)
        self.windows: list[int | None] | None = None

    @cached_property
    def buckets(self) -> Buckets:
        """Only of sequences that share nothing."""
        return Buckets(self.layout.prompt_lengths, self.layout.position_ids.device)


class Buckets:
    """Packed sequences gathered by length.

    lengths: tokens per sequence, in packing order.
    rows: each bucket's packed rows [B, L] to gather; padding points at the sequence's last token.
    back: where each packed row stands among the rows of all buckets laid end to end.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.equal = min(lengths) == max(lengths)
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        buckets, real = [], []
        for members in _alike(lengths):
            step = torch.arange(lengths[members[0]])
            size = sizes[members, None]
            buckets.append(starts[members, None] + torch.minimum(step, size - 1))
            real.append((step < size).flatten())
        gathered, kept = torch.cat([b.flatten() for b in buckets]), torch.cat(real).nonzero().squeeze(1)
        back = torch.empty(sum(lengths), dtype=torch.int64)
        back[gathered[kept]] = kept
        pin = device.type == "cuda"  # then the copies make nobody wait
        self.rows = [(b.pin_memory() if pin else b).to(device, non_blocking=True) for b in buckets]
        self.back = (back.pin_memory() if pin else back).to(device, non_blocking=True)


def _alike(lengths: tuple[int, ...]) -> list[list[int]]:
    """Sequences by falling length (packing order among equals), cut where one falls below the ratio."""
    buckets: list[list[int]] = []
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if not buckets or lengths[s] < _BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(s)
    return buckets


class CannotShareError(ValueError):
    """This attention is not one in which completions can share their prompt; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"completions cannot share their prompt (set share_prompts to false): {reason}")
        self.reason = reason


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside every packed sequence; completions read their prompt's one copy of keys and values.

    query [1, Hq, T, d], key and value [1, Hkv, T, d] with Hkv dividing Hq; returns [1, T, Hq, d] of query's dtype.
    `sliding_window` counts the tokens a query sees, itself included; `softcap` bounds the scores by tanh.
    Raises ValueError when the layout does not add up to T, CannotShareError for shared prompts where fused attention
    cannot do what is asked.
    """
    layout = packed.layout
    if query.shape[2] != layout.num_tokens:
        raise ValueError(f"query has {query.shape[2]} tokens, the layout {layout.num_tokens}")
    window = sliding_window if sliding_window is not None and sliding_window < packed.longest else None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, d]; x[0] would cost a copy back
    reason: str | None
    if dropout:
        reason = f"attention dropout of {dropout}"
    elif k.shape != v.shape:
        reason = f"key heads of {k.shape[2]} and value heads of {v.shape[2]} numbers"
    else:
        # A window that cuts only sequences still to come counts as active here: that is what the self-check asks.
        active = None if window is None else min(window, layout.longest - 1)
        reason = why_not_flash(q, layout, window=active, softcap=softcap)
    if reason is None:
        out = shared_prefix_attention(q, k, v, layout, scale=scaling, window=window, softcap=softcap)
        return out.unsqueeze(0)
    if layout.shares:
        raise CannotShareError(reason)
    return _bucketed(q, k, v, packed.buckets, scaling, dropout, window, softcap)


def _bucketed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[T, Hq, d], [T, Hkv, d] twice -> [1, T, Hq, d]."""
    results = []
    for rows in buckets.rows:
        size, length = rows.shape
        parts = [x.reshape(size, length, *x.shape[1:]) if buckets.equal else x[rows] for x in (q, k, v)]
        bq, bk, bv = (x.transpose(1, 2) for x in parts)
        out = _causal(bq, bk, bv, scaling, dropout, window, softcap)
        results.append(out.transpose(1, 2).flatten(0, 1))
    flat = results[0] if len(results) == 1 else torch.cat(results)
    return (flat if buckets.equal else flat[buckets.back]).unsqueeze(0)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """[B, Hq, L, d], [B, Hkv, L, d] twice -> [B, Hq, L, d]."""
    length = q.shape[2]
    repeat = q.shape[1] // k.shape[1]
    banded = window is not None and window < length
    if not banded and softcap is None and q.is_cuda:  # no copies of K and V; the CPU's fast kernel needs them
        options: dict[str, Any] = {"is_causal": True, "dropout_p": dropout, "scale": scaling}
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=repeat > 1, **options)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if not banded and softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < (window if window is not None else length))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling)
    return _softcapped(q, k, v, visible, scaling, dropout, softcap)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scaling: float | None, dropout: float, softcap: float
) -> Tensor:
    """Attention whose scores pass through softcap * tanh(score / softcap); no fused kernel of torch has it."""
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        # Not -inf: a row of padding that sees nothing must not become NaN and spread through the cache.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def attend(packed: Packed) -> Any:
    """The attention of a packed forward, as layers call it: module, query, key, value and options -> [1, T, Hq, d]."""

    def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return _attention_forward(module, query, key, value, None, packed=packed, **options)[0]

    return attention


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Packed | None = None,
    attend: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer.

    attend: whoever keeps keys and values of its own, as a rollout engine does, gives a function that is called instead,
    with the layer's module, query, key and value and these options.
    """
    if attend is not None:
        return attend(module, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap), None
    if packed is not None:
        unknown = sorted(n for n in ("s_aux", "position_bias") if kwargs.get(n) is not None)
        if unknown:
            raise ValueError(f"this model's attention uses {unknown}, which packed attention does not support")
        if packed.windows is not None:
            packed.windows.append(sliding_window)
        options: Any = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        out = packed_attention(query, key, value, packed, **options)
        # The same memory, but no view of anything: compiled layers are compiled anew for every kind of view they get.
        return torch.ops.aten._unsafe_view(out, out.shape), None
    if softcap is not None:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = attention_mask
        if visible is None and query.shape[2] > 1:
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return _softcapped(query, key, value, visible, scaling, dropout, softcap).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@cache
def register() -> str:
    """Make "fastgrpo" known to transformers, for any model that uses its attention interface; returns the name.

    One function for good: compiled layers would be compiled anew for another. They call it as it is (compilation.py).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, torch.compiler.disable(_attention_forward, reason="lengths are no constants"))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def no_mask(device: torch.device) -> Tensor:
    """A 4-D mask, which transformers hands through as it is; packed attention ignores it.

    It keeps transformers from building a dense T x T mask out of the position ids.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
