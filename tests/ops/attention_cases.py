"""Layouts and inputs for the tests of attention, and dense maths behind the signatures of flash attention's kernels."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import PackedLayout

NAMES = ("out", "dq", "dk", "dv")

GROUPS: list[tuple[list[int], list[list[int]]]] = [
    ([3, 5], [[2, 4, 4], [1]]),
    ([4], [[3]]),  # one sequence
    ([4, 2], [[], [3]]),  # the last prompt is followed by its completion
    ([4, 2, 2], [[2, 2], [], [3, 3]]),  # a prompt that nobody asks, between others
    ([4, 2, 4], [[2, 2], [], [4]]),  # the same between two that look alike
    ([3, 3, 2], [[2], [2], [0, 0]]),
    ([1, 1], [[0, 1, 5], [7]]),
    ([6, 6, 3], [[], [], []]),  # nothing shared: plain packing
    ([9, 8, 8, 7, 10, 64, 65, 9], [[]] * 8),  # short and long ones of many lengths
    ([5, 6, 5, 70], [[7, 8, 6, 7, 6], [], [8, 1, 6], [6, 66, 7]]),
    ([], []),
]


def ragged() -> st.SearchStrategy[tuple[list[int], list[list[int]]]]:
    group = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=4))
    return st.lists(group, max_size=4).map(lambda groups: ([p for p, _ in groups], [c for _, c in groups]))


def inputs(
    layout: PackedLayout,
    num_q: int = 4,
    num_kv: int = 2,
    d: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, which want gradients, and the upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    heads = (num_q, num_kv, num_kv, num_q)
    x = [torch.randn(layout.num_tokens, h, d, generator=g, dtype=torch.float64).to(dtype) for h in heads]
    device = layout.position_ids.device
    return [*(t.to(device).requires_grad_() for t in x[:3]), x[3].to(device)]


def run(attention: Any, x: list[Tensor], layout: PackedLayout, **options: Any) -> list[Tensor]:
    """out, dq, dk, dv."""
    out = attention(*x[:3], layout, **options)
    return [out.detach(), *torch.autograd.grad(out, x[:3], x[3])]


def assert_near(got: list[Tensor], want: list[Tensor], out: float = 1e-12, gradient: float = 1e-10) -> None:
    for name, a, b, tolerance in zip(NAMES, got, want, (out, *[gradient] * 3), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"{name}: {(a - b).abs().max()}"


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _wide(x: Tensor) -> Tensor:
    """What kernels compute in: only their results are rounded."""
    return x if x.dtype == torch.float64 else x.float()


class DenseVarlen:
    """Variable-length flash attention in loops: what the CUDA kernels compute, with what they are told recorded.

    As theirs, its log-sum-exp is [H, Nq], and keys without queries keep whatever their gradients' memory holds: NaN.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def _score(self, q: Tensor, k: Tensor, causal: bool, scale: float, left: int, softcap: float) -> tuple[Tensor, Any]:
        q, k = _wide(q), _wide(k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        score = torch.einsum("ihd,jhd->hij", q, k) * scale
        slope: Any = 1.0
        if softcap:
            bent = torch.tanh(score / softcap)
            score, slope = bent * softcap, 1 - bent**2
        distance = torch.arange(len(q))[:, None] - torch.arange(len(k)) + (len(k) - len(q))
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if left >= 0:
            hidden |= distance > left
        return score.masked_fill(hidden, -torch.inf), slope

    def _ranges(self, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **what: Any) -> list[tuple[slice, slice]]:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (type(max_q), type(max_k)) == (int, int)
        assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
        self.calls.append(what)
        q, k = cu_q.tolist(), cu_k.tolist()
        return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: tuple[Any, ...],
        causal: bool,
        scale: float,
        left: int,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        lse = torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys in self._ranges(*bounds, pass_="forward", causal=causal):
            score, _ = self._score(q[rows], k[keys], causal, scale, left, softcap)
            values = _wide(v[keys]).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            lse[:, rows] = score.logsumexp(-1)
            out[rows] = torch.einsum("hij,jhd->ihd", score.softmax(-1), values).to(q.dtype)
        return out, lse

    def backward(
        self, x: tuple[Tensor, ...], bounds: tuple[Any, ...], causal: bool, scale: float, left: int, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.full(t.shape, torch.nan, dtype=t.dtype) for t in x[1:4])
        dout, q, k, v, out, lse = (_wide(t) for t in x)
        assert x[5].is_contiguous()
        group = q.shape[1] // k.shape[1]
        strict = torch.are_deterministic_algorithms_enabled() and not (
            torch.is_deterministic_algorithms_warn_only_enabled()
        )
        for rows, keys in self._ranges(*bounds, pass_="backward", causal=causal, strict=strict):
            if rows.start == rows.stop:
                continue
            score, slope = self._score(q[rows], k[keys], causal, scale, left, softcap)
            p = torch.exp(score - lse[:, rows, None])
            values, wide = (t[keys].repeat_interleave(group, dim=1) for t in (v, k))
            dp = torch.einsum("ihd,jhd->hij", dout[rows], values) - (dout[rows] * out[rows]).sum(-1).T[..., None]
            ds = p * dp * scale * slope
            dq[rows] = torch.einsum("hij,jhd->ihd", ds, wide)
            dk[keys] = torch.einsum("hij,ihd->jhd", ds, q[rows]).unflatten(1, (-1, group)).sum(2)
            dv[keys] = torch.einsum("hij,ihd->jhd", p, dout[rows]).unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv
