"""`group_advantages` in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m interpreter` on this file."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import group_advantages
from fastgrpo_kernels.backend import use_triton
from fastgrpo_kernels.group_advantages.reference import group_advantages_reference

pytestmark = pytest.mark.interpreter

COMBINATIONS = [
    (baseline, scale)
    for baseline in ("mean", "leave_one_out", "none")
    for scale in ("group", "batch", "none")
    if (baseline, scale) != ("none", "group")
]


def loop(rewards: list[float], groups: list[int], baseline: str, scale: str, eps: float) -> list[float]:
    """The definitions in float64, sample by sample."""

    def std(values: list[float]) -> float:
        mean = math.fsum(values) / max(len(values), 1)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))

    def advantage(i: int) -> float:
        members = [j for j, g in enumerate(groups) if g == groups[i] and not math.isnan(rewards[j])]
        own = [rewards[j] for j in members]
        if math.isnan(rewards[i]) or (baseline != "none" and len(set(own)) <= 1):
            return 0.0
        others = own if baseline == "mean" else [rewards[j] for j in members if j != i]
        centre = 0.0 if baseline == "none" else math.fsum(others) / len(others)
        valid = [r for r in rewards if not math.isnan(r)]
        divisor = {"group": std(own) + eps, "batch": std(valid) + eps, "none": 1.0}[scale]
        return (rewards[i] - centre) / divisor

    return [advantage(i) for i in range(len(rewards))]


def check(rewards: Tensor, groups: Tensor, baseline: str, scale: str, eps: float = 1e-4) -> Tensor:
    """Within 1e-6 of the PyTorch path's fp32 result, zero in the same places; returns what Triton gave."""
    assert use_triton(rewards)
    got = group_advantages(rewards, groups, baseline=baseline, scale=scale, eps=eps)
    want = group_advantages_reference(rewards, groups, baseline, scale, eps).float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
    dead = want == 0
    assert torch.equal(got[dead].view(torch.int32), want[dead].view(torch.int32))
    return got


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    samples=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -2.5, 0.1, 1e4, math.nan]), st.sampled_from([0, 3, -7, 2**40])),
        max_size=12,
    ),
    combination=st.sampled_from(COMBINATIONS),
    eps=st.sampled_from([1e-4, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_matches_the_loop(
    samples: list[tuple[float, int]], combination: tuple[str, str], eps: float, dtype: torch.dtype
) -> None:
    rewards, groups = torch.tensor([r for r, _ in samples], dtype=dtype), [g for _, g in samples]
    got = check(rewards, torch.tensor(groups, dtype=torch.int64), *combination, eps)
    want = loop(rewards.tolist(), groups, *combination, eps)
    assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-12)
    assert all(g == 0 for g, w in zip(got.tolist(), want, strict=True) if w == 0)


@pytest.mark.parametrize("combination", [("leave_one_out", "group"), ("none", "batch")])
def test_groups_over_several_blocks_in_any_order(combination: tuple[str, str]) -> None:
    g = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 3, (600,), generator=g) * 2**33
    groups[[0, 400, 599]] = torch.tensor([5, 6, 5])
    rewards = torch.rand(600, generator=g)
    rewards[torch.rand(600, generator=g) < 0.1] = torch.nan
    check(rewards, groups, *combination)


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c[0] != "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_are_exactly_zero(combination: tuple[str, str], eps: float) -> None:
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in floating point, and 1e-8 off would pass eps = 0 as +-0.6.
    rewards = torch.tensor([0.1] * 3 + [0.3] * 7 + [1 / 3, math.nan] + [math.nan] * 2 + [1.0, 2.0])
    groups = torch.tensor([0] * 3 + [1] * 7 + [2, 2] + [3] * 2 + [4, 4])
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    got = check(rewards[shuffled], groups[shuffled], *combination, eps)
    dead = groups[shuffled] < 4
    assert not got[dead].view(torch.int32).any()
    assert got[~dead].all()


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_sample_one_sample_and_only_failed_ones(combination: tuple[str, str]) -> None:
    for rewards in (torch.zeros(0), torch.tensor([3.0]), torch.tensor([torch.nan]), torch.full((5,), torch.nan)):
        check(rewards, torch.arange(rewards.numel()) // 2, *combination)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_close_rewards_and_infinite_ones(combination: tuple[str, str]) -> None:
    """fp32 statistics would keep two or three digits of the first group."""
    rewards = torch.tensor([1000.0, 1000.0625, 1000.125, 1.0, torch.inf, 2.0, torch.inf, torch.inf, 0.0, -0.0, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    check(rewards, groups, *combination)
    check(rewards[:3], groups[:3], *combination)


def test_repeats_bitwise_and_takes_strided_inputs() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, groups = torch.randn(20, generator=g), torch.randint(0, 4, (20,), generator=g)
    for combination in COMBINATIONS:
        first = check(rewards, groups, *combination)
        again = check(torch.stack([rewards] * 2, 1)[:, 0], torch.stack([groups] * 2, 1)[:, 0], *combination)
        assert torch.equal(first, again)


def test_the_registered_op() -> None:
    args = (torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.int64), "mean", "batch", 1e-4)
    torch.library.opcheck(torch.ops.fastgrpo.group_advantages.default, args)
