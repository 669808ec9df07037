"""`gae` in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m interpreter tests/ops/test_gae_kernel.py`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import gae
from fastgrpo_kernels.backend import use_triton

pytestmark = pytest.mark.interpreter


def loop(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The backward recurrence in float64, token by token."""
    r, v = rewards.tolist(), values.tolist()
    advantages = [0.0] * len(r)
    for start, stop in pairwise(cu_seqlens.tolist()):
        running, following = 0.0, 0.0
        for t in reversed(range(start, stop)):
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            advantages[t], following = running, v[t]
    result = torch.tensor(advantages, dtype=torch.float64)
    return result, result + values.double()


def draw(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=g).to(dtype)
    return rewards, values, torch.tensor([0, *lengths]).cumsum(0).int()


def check(case: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    """Both results are the float64 loop's, rounded to fp32."""
    assert use_triton(case[0])
    for got, want in zip(gae(*case, gamma=gamma, lam=lam), loop(*case, gamma, lam), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=1e-11)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 7, 40]), max_size=4),
    seed=st.integers(0, 999),
    gamma=st.sampled_from([1.0, 0.99, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_matches_the_loop(lengths: list[int], seed: int, gamma: float, lam: float, dtype: torch.dtype) -> None:
    check(draw(lengths, seed, dtype), gamma, lam)


@pytest.mark.parametrize("length", [1023, 1024, 1025])
def test_the_state_goes_from_block_to_block(length: int) -> None:
    check(draw([2, length, 0]), gamma=1.0, lam=0.95)


def test_a_long_sequence() -> None:
    """gamma rounded to fp32 is off by 1.4e-8, which 9,001 steps would make 1e-4."""
    check(draw([9001, 0]), gamma=0.99999, lam=1.0)


def test_gamma_and_lam_are_launched_in_float64() -> None:
    """The interpreter hands a kernel Python's floats; on a GPU, the annotation keeps them from becoming fp32."""
    from fastgrpo_kernels.gae.kernel import gae_kernel

    annotations = gae_kernel.fn.__annotations__
    assert annotations["gamma"] == annotations["lam"] == "tl.float64"


def test_no_row_and_no_sequence() -> None:
    for lengths in ([], [0], [0, 0, 0]):
        advantages, returns = gae(*draw(lengths))
        assert advantages.shape == returns.shape == (0,)


def test_a_sequence_does_not_see_its_neighbours() -> None:
    rewards, values, cu = draw([1, 1030, 1])
    rewards[0], values[-1] = torch.nan, torch.inf
    got = [x[1:-1] for x in gae(rewards, values, cu)]
    alone = gae(rewards[1:-1], values[1:-1], torch.tensor([0, 1030], dtype=torch.int32))
    assert all(torch.equal(x, y) for x, y in zip(got, alone, strict=True))


def test_repeats_bitwise_and_takes_strided_inputs() -> None:
    rewards, values, cu = draw([1030])
    first = gae(rewards, values, cu)
    again = gae(torch.stack([rewards, values], 1)[:, 0], torch.stack([rewards, values], 1)[:, 1], cu)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_registered_op() -> None:
    torch.library.opcheck(torch.ops.fastgrpo.gae.default, (*draw([4]), 0.99, 0.95))
