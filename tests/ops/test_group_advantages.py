"""`group_advantages`: against loops, and its exact zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo_kernels import GroupRewards, group_advantages


def loop(rewards: list[float], groups: list[int], baseline: str, scale: str, eps: float) -> list[float]:
    """The definitions, sample by sample."""

    def std(values: list[float]) -> float:
        if len(values) < 2:
            return 0.0
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))

    valid = [r for r in rewards if not math.isnan(r)]
    result = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or (baseline != "none" and len(set(members)) <= 1):
            result.append(0.0)
            continue
        advantage = reward
        if baseline == "mean":
            advantage -= math.fsum(members) / len(members)
        elif baseline == "leave_one_out":
            others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
            others = [r for r in others if not math.isnan(r)]
            advantage -= math.fsum(others) / len(others)
        divisor = {"group": std(members) + eps, "batch": std(valid) + eps, "none": 1.0}[scale]
        result.append(advantage / divisor)
    return result


COMBINATIONS = [
    (baseline, scale)
    for baseline in ("mean", "leave_one_out", "none")
    for scale in ("group", "batch", "none")
    if (baseline, scale) != ("none", "group")
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    samples=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -2.5, 0.1, 1e4, math.nan]), st.sampled_from([0, 3, -7, 2**40])),
        max_size=12,
    ),
    combination=st.sampled_from(COMBINATIONS),
    eps=st.sampled_from([1e-4, 0.5]),
)
def test_matches_the_loop(samples: list[tuple[float, int]], combination: tuple[str, str], eps: float) -> None:
    rewards, groups = [r for r, _ in samples], [g for _, g in samples]
    want = loop(rewards, groups, *combination, eps)
    got = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups, dtype=torch.int64),
        baseline=combination[0],
        scale=combination[1],
        eps=eps,
    )
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert all(g == 0 for g, w in zip(got.tolist(), want, strict=True) if w == 0)


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c[0] != "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_are_exactly_zero(combination: tuple[str, str], eps: float, dtype: torch.dtype) -> None:
    baseline, scale = combination
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in floating point, and 1e-8 off would pass eps = 0 as +-0.6.
    rewards = torch.tensor([0.1] * 3 + [0.3] * 7 + [1 / 3, math.nan] + [math.nan] * 2 + [1.0, 2.0], dtype=dtype)
    groups = torch.tensor([0] * 3 + [1] * 7 + [2, 2] + [3] * 2 + [4, 4])
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    got = group_advantages(rewards[shuffled], groups[shuffled], baseline=baseline, scale=scale, eps=eps)
    dead = groups[shuffled] < 4
    assert not got[dead].any()
    assert got[~dead].all()


def test_a_failed_sample_gets_zero_whatever_the_divisor() -> None:
    rewards, groups = torch.tensor([2.0, 2.0, math.nan]), torch.zeros(3, dtype=torch.int64)
    got = group_advantages(rewards, groups, baseline="none", scale="batch", eps=0.0)  # the batch's std is 0
    assert got.tolist() == [math.inf, math.inf, 0.0]


def test_dtype_and_autograd() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    groups = torch.zeros(3, dtype=torch.int64)
    advantage = group_advantages(rewards, groups)
    assert advantage.dtype == torch.float32
    assert not advantage.requires_grad
    assert group_advantages(rewards.detach().half(), groups).dtype == torch.float32
    assert group_advantages(rewards.detach().double(), groups).dtype == torch.float64
    assert torch.equal(GroupRewards(rewards, groups).advantages(), advantage)


def test_order_of_the_samples_does_not_matter() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, groups = torch.rand(40, generator=g), torch.randint(0, 6, (40,), generator=g)
    permutation = torch.randperm(40, generator=g)
    want = group_advantages(rewards, groups)[permutation]
    torch.testing.assert_close(group_advantages(rewards[permutation], groups[permutation]), want)


def test_no_sample() -> None:
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_bad_inputs() -> None:
    rewards, groups = torch.rand(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"scale: expected batch or none with baseline='none', got 'group'"):
        group_advantages(rewards, groups, baseline="none")
    with pytest.raises(ValueError, match=r"baseline: expected one of mean, leave_one_out, none, got 'median'"):
        group_advantages(rewards, groups, baseline="median")
    with pytest.raises(ValueError, match=r"scale: expected one of group, batch, none, got 'std'"):
        group_advantages(rewards, groups, scale="std")
    with pytest.raises(TypeError, match=r"group_index: expected dtype int64, got int32"):
        group_advantages(rewards, groups.int())
    with pytest.raises(ValueError, match=r"group_index: expected shape \[S\] = \[4\], got \[3\]"):
        group_advantages(rewards, groups[:3])
    with pytest.raises(TypeError, match=r"rewards: expected dtype float16, .*got int64"):
        group_advantages(groups, groups)
    with pytest.raises(ValueError, match=r"eps: expected a finite number >= 0, got -1"):
        group_advantages(rewards, groups, eps=-1)
