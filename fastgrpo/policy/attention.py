"""Attention over packed sequences, registered with transformers under the name "fastgrpo".

A packed forward passes `segments=` to the model: `Segments(lengths)`, or `SharedPrompts(...)` where completions share
their prompts. transformers hands that keyword to every layer's attention, also under gradient checkpointing. Without it
(ordinary generation) the call is transformers' own sdpa.

Segments: sequences of like length are gathered into one padded call of torch's scaled_dot_product_attention. With the
padding on the right, causality alone keeps real tokens from seeing it, so the result is exact and needs no mask.
SharedPrompts: `fastgrpo_kernels`' shared_prefix_attention on views; what that cannot do exactly or fast is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "fastgrpo"

# A bucket holds sequences no shorter than this share of its longest: bounds the padding, and the number of calls.
_BUCKET_RATIO = 0.75


class Segments:
    """Where each packed sequence begins and ends, with the gather indices every layer shares.

    lengths: tokens per sequence, in packing order, on the host. Raises ValueError when one is not positive.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive, one per sequence; got {lengths}")
        self.total = sum(lengths)
        self.equal = min(lengths) == max(lengths)
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        # Each bucket's packed rows [B, L] to gather; padding points at the sequence's last token.
        buckets, real = [], []
        for members in _buckets(lengths):
            step = torch.arange(lengths[members[0]])
            size = sizes[members, None]
            buckets.append(starts[members, None] + torch.minimum(step, size - 1))
            real.append((step < size).flatten())
        # Where each packed row stands among the rows of all buckets laid end to end.
        gathered, kept = torch.cat([b.flatten() for b in buckets]), torch.cat(real).nonzero().squeeze(1)
        back = torch.empty(self.total, dtype=torch.int64)
        back[gathered[kept]] = kept
        self.rows = [b.to(device) for b in buckets]
        self.back = back.to(device)


def _buckets(lengths: tuple[int, ...]) -> list[list[int]]:
    """Sequences by falling length (packing order among equals), cut where one falls below the ratio."""
    buckets: list[list[int]] = []
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if not buckets or lengths[s] < _BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(s)
    return buckets


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside every packed sequence.

    query [1, Hq, T, d], key and value [1, Hkv, T, d] with Hkv dividing Hq; returns [1, T, Hq, d] of query's dtype.
    `sliding_window` counts the tokens a query sees, itself included; `softcap` bounds the scores by tanh.
    """
    heads, total, width = query.shape[1], query.shape[2], value.shape[3]
    if total != segments.total:
        raise ValueError(f"query has {total} tokens, segments describe {segments.total}")
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, d]
    results = []
    for rows in segments.rows:
        size, length = rows.shape
        if segments.equal:
            parts = [x.reshape(size, length, *x.shape[1:]) for x in (q, k, v)]
        else:
            parts = [x[rows] for x in (q, k, v)]
        bq, bk, bv = (x.transpose(1, 2) for x in parts)
        out = _causal(bq, bk, bv, scaling, dropout, sliding_window, softcap)
        results.append(out.transpose(1, 2).reshape(size * length, heads, width))
    flat = results[0] if len(results) == 1 else torch.cat(results)
    return (flat if segments.equal else flat[segments.back]).unsqueeze(0)


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


class SharedPrompts:
    """Which completions share which prompt, with the index tensors every layer shares.

    prompt_lengths, completion_lengths: as in `fastgrpo_kernels.PackedLayout`, whose errors are raised.
    longest: the longest sequence that a sliding window must not cut; by default the longest one here.
    """

    def __init__(
        self,
        prompt_lengths: tuple[int, ...],
        completion_lengths: tuple[tuple[int, ...], ...],
        device: torch.device,
        longest: int = 0,
    ) -> None:
        from fastgrpo_kernels import PackedLayout

        self.layout = PackedLayout(prompt_lengths, completion_lengths, device)
        self.longest = max(longest, self.layout.longest)


class CannotShareError(ValueError):
    """This attention is not one in which completions can share their prompt; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"completions cannot share their prompt (set share_prompts to false): {reason}")
        self.reason = reason


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: SharedPrompts,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention in which a prompt's completions read one copy of its keys and values.

    Shapes as in `packed_attention`. Raises CannotShareError for dropout, a softcap, a window shorter than the longest
    sequence, and tensors that no flash attention takes.
    """
    from fastgrpo_kernels import shared_prefix_attention
    from fastgrpo_kernels.shared_prefix_attention import backends
    from fastgrpo_kernels.shared_prefix_attention.options import Options

    if dropout:
        raise CannotShareError(f"attention dropout of {dropout}")
    if softcap is not None:
        raise CannotShareError(f"attention scores capped at {softcap}")
    if sliding_window is not None and sliding_window < shared.longest:
        raise CannotShareError(f"a sliding window of {sliding_window} tokens, less than a sequence of {shared.longest}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    if k.shape != v.shape:
        raise CannotShareError(f"key heads of {k.shape[2]} and value heads of {v.shape[2]} numbers")
    if backends.choose(q, shared.layout.attention, Options(1.0, None, None)) == "dense":
        raise CannotShareError(f"{q.dtype} heads of {q.shape[2]} on {q.device.type}, which no flash attention takes")
    return shared_prefix_attention(q, k, v, shared.layout, scale=scaling).unsqueeze(0)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | SharedPrompts | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer."""
    if segments is not None:
        unknown = sorted(n for n in ("s_aux", "position_bias") if kwargs.get(n) is not None)
        if unknown:
            raise ValueError(f"this model's attention uses {unknown}, which packed attention does not support")
        options: Any = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        if isinstance(segments, SharedPrompts):
            return shared_attention(query, key, value, segments, **options), None
        return packed_attention(query, key, value, segments, **options), None
    if softcap is not None:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = attention_mask
        if visible is None and query.shape[2] > 1:
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return _softcapped(query, key, value, visible, scaling, dropout, softcap).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def register() -> str:
    """Make "fastgrpo" known to transformers, for any model that uses its attention interface; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def no_mask(device: torch.device) -> Tensor:
    """A 4-D mask, which transformers hands through as it is; packed attention ignores it.

    It keeps transformers from building a dense T x T mask out of the position ids.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
