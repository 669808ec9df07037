# mypy: disable-error-code="no-untyped-def"
"""The advantage of one sample from the rewards of its group, inlined into the coefficient kernel.

Every program reads all S labels and rewards, so a batch costs S^2 reads out of the L2 cache: nothing beside a launch of
its own while S is in the hundreds. Statistics are float64, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _valid_members(p_rewards, p_group_index, group, o_sample, num_samples):
    """A block of rewards, fp32; which of them are valid and, with a `p_group_index`, belong to `group`."""
    reward = tl.load(p_rewards + o_sample, mask=o_sample < num_samples, other=float("nan")).to(tl.float32)
    valid = reward == reward
    if p_group_index is not None:
        valid &= tl.load(p_group_index + o_sample, mask=o_sample < num_samples, other=0) == group
    return reward, valid


@triton.jit
def _statistics(p_rewards, p_group_index, group, num_samples, STD: tl.constexpr, BLOCK: tl.constexpr):
    """Of the valid rewards of a group (all where `p_group_index` is None): number, mean, unbiased std, extremes."""
    b_count = tl.zeros((BLOCK,), tl.int32)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    b_low = tl.full((BLOCK,), float("inf"), tl.float32)
    b_high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, num_samples, BLOCK):
        o_sample = begin + tl.arange(0, BLOCK)
        reward, valid = _valid_members(p_rewards, p_group_index, group, o_sample, num_samples)
        b_count += valid.to(tl.int32)
        b_sum += tl.where(valid, reward, 0.0).to(tl.float64)
        b_low = tl.where(valid & (reward < b_low), reward, b_low)
        b_high = tl.where(valid & (reward > b_high), reward, b_high)
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1).to(tl.float64)
    b_square = tl.zeros((BLOCK,), tl.float64)
    if STD:
        for begin in range(0, num_samples, BLOCK):
            o_sample = begin + tl.arange(0, BLOCK)
            reward, valid = _valid_members(p_rewards, p_group_index, group, o_sample, num_samples)
            deviation = tl.where(valid, reward.to(tl.float64) - mean, 0.0)
            b_square += deviation * deviation
    std = tl.sqrt(tl.sum(b_square, 0) / tl.maximum(count - 1, 1).to(tl.float64))
    return count, mean, std, tl.min(b_low, 0), tl.max(b_high, 0)


@triton.jit
def group_advantage(p_rewards, p_group_index, i_sample, num_samples, eps, V: tl.constexpr, BLOCK: tl.constexpr):
    """The advantage of sample `i_sample`, fp32, as `group_advantages` gives it; whether its reward is valid."""
    reward = tl.load(p_rewards + i_sample).to(tl.float32)
    valid = reward == reward
    group = tl.load(p_group_index + i_sample)
    factor = tl.full((), 1.0, tl.float64)
    if V.scale == "batch":
        _, _, std, _, _ = _statistics(p_rewards, None, group, num_samples, True, BLOCK)
        factor /= std + eps
    if V.baseline == "none":
        advantage = reward.to(tl.float64) * factor
    else:
        count, mean, std, low, high = _statistics(
            p_rewards, p_group_index, group, num_samples, V.scale == "group", BLOCK
        )
        if V.baseline == "leave_one_out":  # R - mean of the others = n / (n - 1) * (R - mean)
            factor *= count.to(tl.float64) / tl.maximum(count - 1, 1).to(tl.float64)
        if V.scale == "group":
            factor /= std + eps
        # The mean of equal rewards need not equal them in floating point, and eps would blow the difference up.
        advantage = tl.where(low < high, (reward.to(tl.float64) - mean) * factor, 0.0)
    return tl.where(valid, advantage, 0.0).to(tl.float32), valid
