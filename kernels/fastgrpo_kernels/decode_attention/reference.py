"""Decoding attention in plain PyTorch, in float64, a row at a time: the definition to read first."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row b's path: its prompt's kept tokens, its own kept tokens, its new token, which is the query.

    Shapes as of `decode_attention`. Returns out [B, Hq, d] in float64, and the pools with the new tokens in them.
    """
    keys, values = keys.clone(), values.clone()
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b, (first, prompt, own, kept) in enumerate(where.T.tolist()):
        keys[own + kept], values[own + kept] = k[b], v[b]
        path = [*range(first, first + prompt), *range(own, own + kept + 1)]
        path = path if window is None else path[-window:]
        seen_keys, seen_values = (x[path].double().repeat_interleave(repeat, 1) for x in (keys, values))
        scores = torch.einsum("hd,thd->ht", q[b].double(), seen_keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[b] = torch.einsum("ht,thd->hd", scores.softmax(-1), seen_values)
    return out, keys, values
