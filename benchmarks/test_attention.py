"""Attention of completions that share a prompt, forward and backward: the prompt there once, against repeated.

The peer is torch's scaled_dot_product_attention, causal, on rows that hold the prompt again for each completion; all
completions have one length, so that it has no padding either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DEVICE, OURS, Case, relative_error
from fastgrpo_kernels import PackedLayout, shared_prefix_attention

_ON_GPU = DEVICE.type == "cuda"
_DTYPE = torch.bfloat16 if _ON_GPU else torch.float32
_HEADS, _KV_HEADS, _HEAD_DIM = (12, 2, 128) if _ON_GPU else (6, 2, 64)


@dataclass(frozen=True)
class Size:
    prompt: int
    n: int
    completion: int


@dataclass(frozen=True)
class Inputs:
    """q [T, Hq, d], k, v [T, Hkv, d] and the upstream gradient of the output [T, Hq, d], or as many rows repeated.

    Repeated: [n, H, prompt + completion, d]. The gradient of the prompt's own outputs is 0.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    upstream: Tensor
    layout: PackedLayout
    size: Size


def make_inputs(seed: int, size: Size, repeated: bool) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(seed)
    rows = size.prompt + size.n * size.completion
    q, k, v, upstream = (
        torch.randn(rows, heads, _HEAD_DIM, generator=g, device=DEVICE).to(_DTYPE)
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)
    )
    upstream[: size.prompt] = 0
    made = [repeat(t, size) if repeated else t for t in (q, k, v)]
    layout = PackedLayout([size.prompt], [[size.completion] * size.n], DEVICE)
    q, k, v = (t.requires_grad_() for t in made)
    return Inputs((q, k, v), repeat(upstream, size) if repeated else upstream, layout, size)


def repeat(x: Tensor, size: Size) -> Tensor:
    """[T, H, d] -> [n, H, prompt + completion, d]."""
    prompt, completions = x[: size.prompt], x[size.prompt :].view(size.n, size.completion, *x.shape[1:])
    return torch.cat([prompt.expand(size.n, *prompt.shape), completions], 1).transpose(1, 2).contiguous()


def shared(x: Inputs) -> Tensor:
    out = shared_prefix_attention(*x.qkv, x.layout)
    out.backward(x.upstream)
    return out.detach()


def sdpa(x: Inputs) -> Tensor:
    out = F.scaled_dot_product_attention(*x.qkv, is_causal=True, enable_gqa=True)
    out.backward(x.upstream)
    return out.detach()


def errors(x: Inputs, out: Tensor) -> dict[str, float]:
    """Against float64 on repeated rows; the gradients of a prompt's copies belong together."""
    true = make_inputs(0, x.size, repeated=True)
    q, k, v = (t.detach().double().requires_grad_() for t in true.qkv)
    k_all, v_all = (t.repeat_interleave(_HEADS // _KV_HEADS, 1) for t in (k, v))
    length = q.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    scores = (q @ k_all.transpose(2, 3) / _HEAD_DIM**0.5).masked_fill(mask, -torch.inf)
    expected = scores.softmax(-1) @ v_all
    expected.backward(true.upstream.double())
    found = {"out": relative_error(out if out.dim() == 4 else repeat(out, x.size), expected.detach())}
    for name, mine, theirs in zip("qkv", x.qkv, (q, k, v), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        found[f"grad_{name}"] = relative_error(_merged(mine.grad, x.size), _merged(theirs.grad, x.size))
    return found


def _merged(grad: Tensor, size: Size) -> Tensor:
    """[T, H, d], whichever form it has."""
    if grad.dim() == 3:
        return grad
    rows = grad.double().transpose(1, 2)
    return torch.cat([rows[:, : size.prompt].sum(0), rows[:, size.prompt :].flatten(0, 1)])


def cases(size: Size) -> list[Case]:
    """Least work: two matrix products forward and four backward over the pairs that attend, the prompt's once.

    q, out and their gradients, k, v and theirs each move once.
    """
    params: dict[str, Any] = {"prompt": size.prompt, "n": size.n, "completion": size.completion}
    rows = size.prompt + size.n * size.completion
    pairs = size.prompt * (size.prompt + 1) / 2
    pairs += size.n * (size.completion * size.prompt + size.completion * (size.completion + 1) / 2)
    return [
        Case(
            op="shared_prefix_attention",
            peer=peer,
            params=params,
            tokens=size.n * (size.prompt + size.completion),
            inputs=partial(make_inputs, size=size, repeated=peer != OURS),
            run=run,
            errors=errors,
            tolerance=dict.fromkeys(("out", "grad_q", "grad_k", "grad_v"), 3e-2 if _ON_GPU else 1e-4),
            rounds=15,
            flops=6 * 2 * _HEAD_DIM * _HEADS * pairs,
            moved=4.0 * _DTYPE.itemsize * _HEAD_DIM * (_HEADS + _KV_HEADS) * rows,
        )
        for peer, run in (("torch", sdpa), (OURS, shared))
    ]


_SIZES = [Size(1024, 16, 256), Size(4096, 16, 1024)] if _ON_GPU else [Size(128, 8, 64), Size(512, 8, 128)]
CASES = [case for size in _SIZES for case in cases(size)]


def test_attention(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
