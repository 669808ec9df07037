"""`gae`: against the backward recurrence, sequence by sequence."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo_kernels import gae


def loop(rewards: list[float], values: list[float], bounds: list[int], gamma: float, lam: float) -> list[float]:
    advantages = [0.0] * len(rewards)
    for start, stop in pairwise(bounds):
        running, following = 0.0, 0.0
        for t in reversed(range(start, stop)):
            delta = rewards[t] + gamma * following - values[t]
            running = delta + gamma * lam * running
            advantages[t], following = running, values[t]
    return advantages


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 999),
    gamma=st.sampled_from([1.0, 0.99, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_matches_the_loop(lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=g, dtype=torch.float64)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    advantages, returns = gae(rewards, values, cu, gamma=gamma, lam=lam)
    want = torch.tensor(loop(rewards.tolist(), values.tolist(), cu.tolist(), gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(advantages, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(returns, want + values, rtol=1e-10, atol=1e-12)


def test_a_long_sequence_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5000, generator=g)
    cu = torch.tensor([0, 4500, 5000], dtype=torch.int32)
    want = loop(rewards.double().tolist(), values.double().tolist(), cu.tolist(), 1.0, 1.0)
    advantages, _ = gae(rewards, values, cu, lam=1.0)
    torch.testing.assert_close(advantages.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_dtype_and_autograd() -> None:
    values = torch.randn(4, requires_grad=True)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for outputs in (gae(torch.ones(4), values, cu), gae(torch.ones(4).bfloat16(), values.detach().half(), cu)):
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in outputs)


def test_bad_inputs() -> None:
    x, cu = torch.zeros(4), torch.tensor([0, 1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"values: expected shape \[N\] = \[4\], got \[3\]"):
        gae(x, x[:3], cu)
    with pytest.raises(TypeError, match=r"cu_seqlens: expected dtype int32, got int64"):
        gae(x, x, cu.long())
    with pytest.raises(ValueError, match=r"cu_seqlens: expected values rising from 0 to N = 4, got \[0, 1, 3\]"):
        gae(x, x, torch.tensor([0, 1, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected values rising from 0 to N = 4, got \[0, 3, 1, 4\]"):
        gae(x, x, torch.tensor([0, 3, 1, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected shape \[S\+1\] with S >= 0, got \[0\]"):
        gae(x, x, cu[:0])
    for name in ("gamma", "lam"):
        with pytest.raises(ValueError, match=rf"{name}: expected a finite number >= 0 and <= 1, got 1.5"):
            gae(x, x, cu, **{name: 1.5})
