"""Attention over a `PackedLayout` in plain differentiable PyTorch, every score at once: the maths to read first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import PackedLayout


def visible(layout: PackedLayout, window: int | None = None) -> Tensor:
    """[T, T] bool: may row i (a query) see row j (a key)? On the CPU, from the layout's definition."""
    sequences: list[tuple[int, int]] = []  # (prompt, completion), completion -1 for the prompt itself
    for prompt, length in enumerate(layout.prompt_lengths):
        sequences += [(prompt, -1)] * length
    for prompt, lengths in enumerate(layout.completion_lengths):
        for completion, length in enumerate(lengths):
            sequences += [(prompt, completion)] * length
    prompt, completion = torch.tensor(sequences, dtype=torch.int64).view(-1, 2).T
    position = layout.position_ids.cpu()
    distance = position[:, None] - position
    own_path = (prompt[:, None] == prompt) & ((completion == -1) | (completion[:, None] == completion))
    return own_path & (distance >= 0) & (distance < (layout.longest if window is None else window))


def shared_prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(softcap(scale * q k^T) + mask) v`. [T, Hq, d], [T, Hkv, d] x 2 -> [T, Hq, d], any dtype.

    A row sees itself and what lies before it on its own path: its prompt, then its completion; with a window the last
    `window` of these, itself included.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(layout, window).to(q.device), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
