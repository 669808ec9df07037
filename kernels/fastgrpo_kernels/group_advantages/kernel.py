# mypy: disable-error-code="no-untyped-def"
"""Group advantages in Triton, without sorting and without knowing the number of groups.

One program per sample; the first sample of each group works for all of it, the others find an earlier one of their
group and leave. So S / G programs read S labels each, in one launch, where a radix sort of the labels alone takes ten.
Estimated, not measured, for S = 8192 and G = 16 on an H200: 40 MB out of the caches and 10-20 us when groups lie
together, 140 MB and 20-40 us in random order. The cost is quadratic: S = 65536 with G = 16 would take 0.5-1.5 ms.

The sums are float64, in a fixed order, because the difference of two close rewards keeps few of fp32's digits; fp32
rewards of similar size even add up exactly, in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

BLOCK = 512
NUM_WARPS = 4


@triton.jit
def _load_rewards(p_rewards, o_sample, num_samples):
    """A block of rewards in fp32, NaN (failed) past the end."""
    return tl.load(p_rewards + o_sample, mask=o_sample < num_samples, other=float("nan")).to(tl.float32)


@triton.jit
def _in_group(p_group_index, o_sample, mask, group):
    """Which samples of a block exist (`mask`) and belong to `group`."""
    return mask & (tl.load(p_group_index + o_sample, mask=mask, other=0) == group)


@triton.jit(do_not_specialize=["num_samples"])
def batch_std_kernel(p_rewards, p_std, num_samples, BLOCK: tl.constexpr):
    """rewards [S] -> [1] float64, the unbiased standard deviation of the valid ones. Grid: (1,)."""
    b_count = tl.zeros((BLOCK,), tl.int32)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, num_samples, BLOCK):
        b_reward = _load_rewards(p_rewards, begin + tl.arange(0, BLOCK), num_samples)
        valid = b_reward == b_reward
        b_count += valid.to(tl.int32)
        b_sum += tl.where(valid, b_reward, 0.0).to(tl.float64)
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1).to(tl.float64)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, num_samples, BLOCK):
        b_reward = _load_rewards(p_rewards, begin + tl.arange(0, BLOCK), num_samples)
        b_deviation = tl.where(b_reward == b_reward, b_reward.to(tl.float64) - mean, 0.0)
        b_sum += b_deviation * b_deviation
    tl.store(p_std, tl.sqrt(tl.sum(b_sum, 0) / tl.maximum(count - 1, 1).to(tl.float64)))


@triton.jit(do_not_specialize=["num_samples"])
def group_advantages_kernel(
    p_rewards,
    p_group_index,
    p_std,
    p_advantage,
    num_samples,
    eps: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rewards [S], group_index [S] int64, std [1] float64 (scale `batch` only) -> advantage [S] fp32. Grid: (S,)."""
    i_sample = tl.program_id(0)
    group = tl.load(p_group_index + i_sample)
    i_block = tl.arange(0, BLOCK)

    # Backwards from this sample, since groups are mostly contiguous: is there an earlier one of its group?
    earlier = 0
    stop = i_sample
    while (stop > 0) & (earlier == 0):
        o_sample = stop - 1 - i_block
        earlier = tl.max(_in_group(p_group_index, o_sample, o_sample >= 0, group).to(tl.int32), 0)
        stop -= BLOCK

    if earlier == 0:
        b_count = tl.zeros((BLOCK,), tl.int32)
        b_sum = tl.zeros((BLOCK,), tl.float64)
        b_low = tl.full((BLOCK,), float("inf"), tl.float32)
        b_high = tl.full((BLOCK,), float("-inf"), tl.float32)
        b_last = tl.zeros((BLOCK,), tl.int32)
        for begin in range(i_sample, num_samples, BLOCK):
            o_sample = begin + i_block
            b_reward = _load_rewards(p_rewards, o_sample, num_samples)
            member = _in_group(p_group_index, o_sample, o_sample < num_samples, group)
            b_last = tl.where(member, o_sample, b_last)
            valid = member & (b_reward == b_reward)
            b_count += valid.to(tl.int32)
            b_sum += tl.where(valid, b_reward, 0.0).to(tl.float64)
            b_low = tl.where(valid & (b_reward < b_low), b_reward, b_low)
            b_high = tl.where(valid & (b_reward > b_high), b_reward, b_high)
        end = tl.max(b_last, 0) + 1
        count = tl.sum(b_count, 0)
        others = tl.maximum(count - 1, 1).to(tl.float64)
        mean = tl.sum(b_sum, 0) / tl.maximum(count, 1).to(tl.float64)
        low, high = tl.min(b_low, 0), tl.max(b_high, 0)

        factor = tl.full((), 1.0, tl.float64)
        if BASELINE == "leave_one_out":  # R - mean of the others = n / (n - 1) * (R - mean)
            factor = count.to(tl.float64) / others
        if SCALE == "group":
            b_square = tl.zeros((BLOCK,), tl.float64)
            for begin in range(i_sample, end, BLOCK):
                o_sample = begin + i_block
                b_reward = _load_rewards(p_rewards, o_sample, end)
                member = _in_group(p_group_index, o_sample, o_sample < end, group)
                b_deviation = tl.where(member & (b_reward == b_reward), b_reward.to(tl.float64) - mean, 0.0)
                b_square += b_deviation * b_deviation
            factor /= tl.sqrt(tl.sum(b_square, 0) / others) + eps
        if SCALE == "batch":
            factor /= tl.load(p_std) + eps

        for begin in range(i_sample, end, BLOCK):
            o_sample = begin + i_block
            b_reward = _load_rewards(p_rewards, o_sample, end)
            member = _in_group(p_group_index, o_sample, o_sample < end, group)
            if BASELINE == "none":
                b_advantage = b_reward.to(tl.float64) * factor
            else:
                # The mean of equal rewards need not equal them in floating point, and eps would blow the difference up.
                b_advantage = tl.where(low < high, (b_reward.to(tl.float64) - mean) * factor, 0.0)
            b_advantage = tl.where(b_reward == b_reward, b_advantage, 0.0)
            tl.store(p_advantage + o_sample, b_advantage.to(tl.float32), mask=member)


def group_advantages_triton(rewards: Tensor, group_index: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """`group_advantages_reference` for rewards of any float dtype but float64; fp32 result, no host sync."""
    rewards, group_index = rewards.contiguous(), group_index.contiguous()
    advantage = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    num_samples = rewards.numel()
    if num_samples == 0:
        return advantage
    with torch.cuda.device_of(rewards):
        std = None
        if scale == "batch":
            std = torch.empty(1, dtype=torch.float64, device=rewards.device)
            batch_std_kernel[(1,)](rewards, std, num_samples, BLOCK, num_warps=NUM_WARPS)
        group_advantages_kernel[(num_samples,)](
            rewards, group_index, std, advantage, num_samples, float(eps), baseline, scale, BLOCK, num_warps=NUM_WARPS
        )
    return advantage


def _spec(baseline: str, scale: str) -> KernelSpec:
    std = {"p_std": "*fp64:16"} if scale == "batch" else {}
    return KernelSpec(
        name=f"group_advantages_{baseline}_{scale}",
        kernel=group_advantages_kernel,
        signature={
            "p_rewards": "*fp32:16",
            "p_group_index": "*i64:16",
            "p_advantage": "*fp32:16",
            "num_samples": "i32",
            "eps": "fp64",
            **std,
        },
        constexprs={"BASELINE": baseline, "SCALE": scale, "BLOCK": BLOCK, **({} if std else {"p_std": None})},
        num_warps=NUM_WARPS,
    )


KERNELS = [
    KernelSpec(
        name="batch_std",
        kernel=batch_std_kernel,
        signature={"p_rewards": "*fp32:16", "p_std": "*fp64:16", "num_samples": "i32"},
        constexprs={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    ),
    *(_spec(baseline, scale) for baseline in ("mean", "leave_one_out") for scale in ("group", "batch", "none")),
    *(_spec("none", scale) for scale in ("batch", "none")),
]
