"""Rewards -> advantages: of completions, compared within each prompt's group or the batch; and from those of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.records import Rollout, hand_out
from fastgrpo_kernels import gae, group_advantages

_EPS = 1e-4  # added to every standard deviation divided by, as TRL does
_WHITENING_EPS = 1e-8  # added to the variance of all tokens' advantages, as TRL's PPO and verl do


def assign_advantages(rollouts: list[Rollout], weights: dict[str, float], config: GRPOConfig) -> None:
    """Fill in `advantage` from the rewards of one rollout batch.

    weights: reward function name -> weight, for `multi_objective_aggregation=normalize_then_sum`.
    Failed samples (NaN reward) leave every statistic and get 0. With an algorithm of advantages per token this is the
    reward less its baseline, and `assign_token_advantages` has the rest.
    """
    group = torch.tensor([r.group for r in rollouts])
    reward = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
    if config.multi_objective_aggregation == "normalize_then_sum":
        advantage = _normalize_then_sum(rollouts, group, weights, config)
    else:
        advantage = _compare(reward, group, config)
    if config.advantage_whitening and not config.per_token:
        advantage = _standardize(advantage, ~reward.isnan(), centred=config.advantage_baseline != "none")
    for rollout, value in zip(rollouts, advantage.tolist(), strict=True):
        rollout.advantage = value


@torch.no_grad()
def assign_token_advantages(rollouts: list[Rollout], config: GRPOConfig, device: torch.device) -> dict[str, float]:
    """Fill in `advantages`, and with a critic `returns`, of one rollout batch; returns its figures.

    rollouts: those that train, with `advantage`; with `old_logprob` and `ref_logprob` where there is a KL penalty, and
    with the critic's `values` where there is one. device: where to compute.

    Token t is rewarded by `r[t] = -kl_coef * (old[t] - ref[t])`, the last one by `advantage` besides. Its advantage is
    GAE's (Schulman et al., arXiv 1506.02438) with the critic's values; without a critic the discounted return
    `sum_k gamma^k r[t + k]`, which is GAE with values 0 and lam 1. The returns are advantages + values. Whitening comes
    after: (A - mean) / sqrt(variance + 1e-8) over all tokens, 0 where all are equal.
    """
    if not rollouts:
        return {}
    lengths = [r.num_tokens for r in rollouts]
    ends = torch.tensor(lengths, device=device).cumsum(0)
    rewards = torch.zeros(sum(lengths), device=device)
    figures = {}
    if config.kl_coef:
        kl = _tokens(rollouts, "old_logprob", device) - _tokens(rollouts, "ref_logprob", device)
        rewards -= config.kl_coef * kl
        figures["objective/kl"] = kl.sum().item() / len(rollouts)
    rewards[ends - 1] += torch.tensor([r.advantage for r in rollouts], device=device)
    values = _tokens(rollouts, "values", device) if config.has_critic else torch.zeros_like(rewards)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    lam = config.lam if config.has_critic else 1.0
    advantages, returns = gae(rewards, values, cu_seqlens, gamma=config.gamma, lam=lam)
    if config.has_critic:
        hand_out(returns, rollouts, "returns")
        unexplained, variance = (returns - values).var(correction=0), returns.var(correction=0)
        figures["explained_variance"] = (1 - unexplained / variance).item()
        figures |= {"critic/value_mean": values.mean().item(), "critic/return_mean": returns.mean().item()}
    hand_out(_whiten(advantages) if config.advantage_whitening else advantages, rollouts, "advantages")
    return figures


def _tokens(rollouts: list[Rollout], name: str, device: torch.device) -> Tensor:
    """[N] of all rollouts, one after the other."""
    return torch.cat([getattr(r, name) for r in rollouts]).to(device)


def _whiten(advantages: Tensor) -> Tensor:
    if bool((advantages == advantages[0]).all()):
        return torch.zeros_like(advantages)
    wide = advantages.double()
    return ((wide - wide.mean()) * (wide.var() + _WHITENING_EPS).rsqrt()).to(advantages.dtype)


def _compare(reward: Tensor, group: Tensor, config: GRPOConfig) -> Tensor:
    """[S] rewards less their baseline, scaled."""
    baseline = config.advantage_baseline
    if baseline == "batch":
        group, baseline = torch.zeros_like(group), "leave_one_out"
    return group_advantages(reward, group, baseline=baseline, scale=config.scale_rewards, eps=_EPS)


def group_signal(rollouts: list[Rollout]) -> dict[int, bool]:
    """Group -> whether its valid rewards differ, so that it carries a gradient."""
    rewards: dict[int, list[float]] = {}
    for r in rollouts:
        rewards.setdefault(r.group, []).extend([] if r.failed else [r.reward])
    return {g: len(values) > 1 and min(values) != max(values) for g, values in rewards.items()}


def _normalize_then_sum(
    rollouts: list[Rollout], group: Tensor, weights: dict[str, float], config: GRPOConfig
) -> Tensor:
    """GDPO (arXiv 2601.05242): every reward normalised in its group, weighted, summed, normalised over the batch."""
    failed = torch.tensor([r.failed for r in rollouts])
    total = torch.zeros(len(rollouts))
    for name, weight in weights.items():
        reward = torch.tensor([math.nan if r.failed else r.rewards[name] for r in rollouts], dtype=torch.float32)
        total += weight * _compare(reward, group, config)
    return _standardize(total, ~failed, centred=config.advantage_baseline != "none")


def _standardize(advantage: Tensor, valid: Tensor, *, centred: bool) -> Tensor:
    """(a - mean) / (std + eps) over the valid samples, 0 for the others and when none differs.

    centred: every group has mean 0 already and the mean is 0 but for rounding: left out, a dead group stays exactly 0.
    """
    values = advantage[valid]
    if values.numel() < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(advantage)
    mean = 0.0 if centred else values.mean()
    return torch.where(valid, (advantage - mean) / (values.std() + _EPS), 0.0)
