"""Which options an algorithm decides, and its advantages, returns and losses against their papers in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.advantages import assign_advantages, assign_token_advantages
from fastgrpo.algorithms import ALGORITHMS
from fastgrpo.config import ConfigError, GRPOConfig, RunConfig, decisive_changes
from fastgrpo.loss import value_loss
from fastgrpo.packing import pack
from fastgrpo.records import Denominators, Prompt, Rollout

_CPU = torch.device("cpu")
_PER_TOKEN = [name for name, algorithm in ALGORITHMS.items() if algorithm.per_token]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"algorithm": "dpo"}, "algorithm='dpo' must be one of grpo, .*, did you mean '"),
            ({"algorithm": "rloo", "advantage_baseline": "mean"}, "baseline='mean' contradicts algorithm=rloo"),
            ({"algorithm": "rloo", "scale_rewards": "group"}, "scale_rewards='group' contradicts algorithm=rloo"),
            ({"algorithm": "reinforce", "advantage_baseline": "batch"}, "'batch' contradicts .*, where it is 'none'"),
            ({"algorithm": "reinforce_pp", "advantage_whitening": False}, "contradicts algorithm=reinforce_pp"),
            ({"algorithm": "ppo", "scale_rewards": "batch"}, "contradicts algorithm=ppo"),
            ({"algorithm": "ppo", "multi_objective_aggregation": "normalize_then_sum"}, "contradicts algorithm=ppo"),
            ({"kl_coef": 0.1}, "kl_coef=0.1 contradicts algorithm=grpo, where it is 0.0"),
            ({"gamma": 0.9}, "gamma=0.9 contradicts algorithm=grpo"),
            ({"lam": 0.9}, "lam is for a critic, and algorithm=grpo has none"),
            ({"algorithm": "reinforce", "critic_model": "x"}, "critic_model is for a critic, and algorithm="),
            ({"algorithm": "ppo", "lam": 1.1}, "lam=1.1 must be between 0 and 1"),
            ({"algorithm": "ppo", "kl_coef": -1.0}, "kl_coef=-1.0 must be 0 or more"),
            ({"algorithm": "ppo", "cliprange_value": 0.0}, "cliprange_value=0.0 must be greater than 0"),
            ({"algorithm": "ppo", "dynamic_sampling": True}, "dynamic_sampling needs a baseline"),
            ({"algorithm": "reinforce_baseline", "dynamic_sampling": True}, "dynamic_sampling needs a baseline"),
            ({"algorithm": "rloo", "num_generations": 1}, "a group needs 2 or more"),
            ({"algorithm": "reinforce_baseline", "num_generations": 1, "num_prompts_per_step": 1}, "of 2 or more"),
            ({"algorithm": "reinforce", "sync_ref_model": True}, "set beta or kl_coef above 0"),
        ],
    )  # fmt: skip
    def test_what_contradicts_the_algorithm_is_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            GRPOConfig(**options)

    @pytest.mark.parametrize(
        ("algorithm", "baseline", "scale", "whitening", "kl_coef"),
        [
            ("grpo", "mean", "group", False, 0.0),
            ("rloo", "leave_one_out", "none", False, 0.0),
            ("reinforce", "none", "none", False, 0.0),
            ("reinforce_baseline", "batch", "none", False, 0.0),
            ("reinforce_pp", "none", "none", True, 0.01),
            ("ppo", "none", "none", True, 0.05),
        ],
    )
    def test_what_is_left_to_the_algorithm(
        self, algorithm: Any, baseline: str, scale: str, whitening: bool, kl_coef: float
    ) -> None:
        config = GRPOConfig(algorithm=algorithm)
        found = (config.advantage_baseline, config.scale_rewards, config.advantage_whitening, config.kl_coef)
        assert found == (baseline, scale, whitening, kl_coef)
        assert (config.needs_reference, config.has_critic) == (kl_coef > 0, algorithm == "ppo")
        config.validate()  # what it became is no contradiction
        run = RunConfig(algorithm=algorithm, model="m", train_dataset="d", reward_funcs=["exact_match"])
        assert run.grpo_config() == config

    @pytest.mark.parametrize("algorithm", ["reinforce", "reinforce_baseline", "reinforce_pp", "ppo"])
    def test_no_group_is_needed(self, algorithm: Any) -> None:
        assert GRPOConfig(algorithm=algorithm, num_generations=1).samples_per_batch == 8

    def test_a_run_older_than_the_algorithms_was_grpo(self) -> None:
        saved = GRPOConfig(beta=0.1).to_dict()
        for name in ("algorithm", "kl_coef", "gamma", "lam", "critic_model", "critic_learning_rate", "cliprange_value"):
            del saved[name]
        assert decisive_changes(saved, GRPOConfig(beta=0.1).to_dict()) == []
        changes = decisive_changes(saved, GRPOConfig(beta=0.1, algorithm="rloo").to_dict())
        assert "algorithm: 'grpo' -> 'rloo'" in changes


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _scored(rewards: list[float], group_size: int = 2, seed: int = 0) -> list[Rollout]:
    """Rollouts of random lengths with random log-probs and values, in the default dtype; NaN = failed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rollouts = []
    for i, reward in enumerate(rewards):
        length = rng.choice([1, 2, 5, 9])
        prompt = Prompt(i // group_size, "", [1, 2])
        rollout = Rollout(prompt, i // group_size, list(range(5, 5 + length)), torch.zeros(length), True, reward=reward)
        rollout.old_logprob, rollout.ref_logprob = (-3 * torch.rand(length, generator=generator) for _ in range(2))
        rollout.values = torch.randn(length, generator=generator)
        rollouts.append(rollout)
    return rollouts


def _advantages_by_the_papers(rollouts: list[Rollout], config: GRPOConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns, written down token by token."""
    rewards = {id(r): r.reward for r in rollouts}
    if config.algorithm == "rloo":  # r_i - 1/(k-1) sum_{j != i} r_j, over the prompt's samples
        for r in rollouts:
            others = [o.reward for o in rollouts if o.group == r.group and o is not r]
            rewards[id(r)] = r.reward - sum(others) / len(others)
    if config.algorithm == "reinforce_baseline":  # the same over the batch
        for r in rollouts:
            others = [o.reward for o in rollouts if o is not r]
            rewards[id(r)] = r.reward - sum(others) / len(others)
    advantages, returns = [], []
    for r in rollouts:
        assert r.old_logprob is not None
        assert r.ref_logprob is not None
        assert r.values is not None
        length = r.num_tokens
        token = [-(config.kl_coef or 0.0) * float(r.old_logprob[t] - r.ref_logprob[t]) for t in range(length)]
        token[-1] += rewards[id(r)]
        own = [0.0] * length
        if config.algorithm == "ppo":  # Schulman et al. 2016, eq. 16: sum_l (gamma lam)^l delta_{t+l}
            value = [*r.values.tolist(), 0.0]
            delta = [token[t] + config.gamma * value[t + 1] - value[t] for t in range(length)]
            for t in range(length):
                own[t] = sum((config.gamma * config.lam) ** k * delta[t + k] for k in range(length - t))
            returns.append(torch.tensor([a + v for a, v in zip(own, value, strict=False)]))
        else:  # Sutton & Barto, eq. 3.8
            for t in range(length):
                own[t] = sum(config.gamma**k * token[t + k] for k in range(length - t))
        advantages.append(torch.tensor(own))
    if config.advantage_whitening:
        every = torch.cat(advantages)
        mean = sum(every.tolist()) / len(every)
        variance = sum((a - mean) ** 2 for a in every.tolist()) / (len(every) - 1)
        advantages = [(a - mean) / math.sqrt(variance + 1e-8) for a in advantages]
    return advantages, returns


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "kl_coef": 0.3}, {"gamma": 0.0}, {"kl_coef": 0.0}])
@pytest.mark.parametrize("algorithm", _PER_TOKEN)
def test_advantages_and_returns_are_the_papers(algorithm: Any, options: dict[str, Any]) -> None:
    config = GRPOConfig(algorithm=algorithm, **options)
    rollouts = _scored([1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.75, 0.0])  # exact in fp32, in which rewards are compared
    assign_advantages(rollouts, {"r": 1.0}, config)
    figures = assign_token_advantages(rollouts, config, _CPU)
    advantages, returns = _advantages_by_the_papers(rollouts, config)
    for r, expected in zip(rollouts, advantages, strict=True):
        assert r.advantages is not None
        # A mean of three or seven rewards is rounded to fp32.
        rounded = 1e-6 if algorithm == "reinforce_baseline" else 1e-12
        torch.testing.assert_close(r.advantages, expected, rtol=rounded, atol=rounded)
    if algorithm != "ppo":
        assert all(r.returns is None for r in rollouts)
        return
    for r, expected in zip(rollouts, returns, strict=True):
        torch.testing.assert_close(r.returns, expected, rtol=1e-12, atol=1e-12)
    target, value = (torch.cat([getattr(r, name) for r in rollouts]) for name in ("returns", "values"))
    unexplained = (target - value - (target - value).mean()).square().mean()
    explained = 1 - unexplained / (target - target.mean()).square().mean()
    assert figures["explained_variance"] == pytest.approx(explained.item(), abs=1e-12)
    if config.kl_coef:
        kl = [(r.old_logprob - r.ref_logprob).sum().item() for r in rollouts]  # type: ignore[operator]
        assert figures["objective/kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_gae_between_its_two_ends(lam: float) -> None:
    """lam 0 is the one-step error, lam 1 the return less the value: then the returns do not hang on the critic."""
    config = GRPOConfig(algorithm="ppo", lam=lam, kl_coef=0.0, advantage_whitening=False)
    rollouts = _scored([1.0, 0.0, 0.5, 2.0])
    assign_advantages(rollouts, {"r": 1.0}, config)
    assign_token_advantages(rollouts, config, _CPU)
    for r in rollouts:
        assert r.values is not None
        after = torch.cat([r.values[1:], torch.tensor([r.reward])])
        goal = torch.full_like(r.values, r.reward) if lam == 1 else after
        torch.testing.assert_close(r.returns, goal, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(r.advantages, goal - r.values, rtol=1e-5, atol=1e-5)


def test_the_batch_s_other_samples_are_the_baseline() -> None:
    rollouts = _scored([1.0, math.nan, 0.0, 0.5], group_size=1)
    assign_advantages(rollouts, {"r": 1.0}, GRPOConfig(algorithm="reinforce_baseline", num_generations=1))
    assert [r.advantage for r in rollouts] == pytest.approx([1 - 0.25, 0.0, 0 - 0.75, 0.5 - 0.5])


@pytest.mark.parametrize("algorithm", _PER_TOKEN)
def test_where_nothing_differs_every_completion_is_dead(algorithm: Any) -> None:
    """Rounding noise, whitened, would train on nothing. REINFORCE alone has something to reward."""
    config = GRPOConfig(algorithm=algorithm, kl_coef=0.0)
    rollouts = _scored([0.1] * 6)
    for r in rollouts:
        r.values = torch.full((r.num_tokens,), 0.1)
    assign_advantages(rollouts, {"r": 1.0}, config)
    assign_token_advantages(rollouts, config, _CPU)
    assert {r.dead for r in rollouts} == {algorithm != "reinforce"}


def test_a_completion_is_dead_only_if_all_its_tokens_are() -> None:
    [rollout] = _scored([1.0])
    rollout.advantage = 1.0
    rollout.advantages = torch.zeros(rollout.num_tokens)
    assert rollout.dead
    rollout.advantages[-1] = -1e-30
    assert not rollout.dead
    rollout.advantage, rollout.advantages = 0.0, None
    assert rollout.dead


def test_nothing_that_trains_gives_no_advantages() -> None:
    assert assign_token_advantages([], GRPOConfig(algorithm="ppo"), _CPU) == {}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("cliprange", [0.2, None])
def test_the_critic_s_loss_is_ppo2_s(cliprange: float | None) -> None:
    rollouts = _scored([1.0] * 6, seed=3)
    for r in rollouts:
        r.advantages, r.returns = torch.zeros(r.num_tokens), torch.randn(r.num_tokens)
    [batch] = pack(rollouts, max_tokens=1000)
    assert batch.values is not None
    assert batch.returns is not None
    values = (batch.values + 0.4 * torch.randn(len(batch.values))).requires_grad_()
    loss, metrics = value_loss(values, batch, cliprange=cliprange, whole=Denominators(9, 50))
    loss.backward()
    total, slopes, clipped = 0.0, [], 0
    for v, old, goal in zip(values.tolist(), batch.values.tolist(), batch.returns.tolist(), strict=True):
        near = v if cliprange is None else min(max(v, old - cliprange), old + cliprange)
        total += 0.5 * max((v - goal) ** 2, (near - goal) ** 2)
        # The clipped term is the larger one only where it is clipped, and there it is a constant.
        constant = (near - goal) ** 2 > (v - goal) ** 2
        slopes.append(0.0 if constant else (v - goal) / 50)
        clipped += constant
    assert loss.item() == pytest.approx(total / 50, rel=1e-14)
    torch.testing.assert_close(values.grad, torch.tensor(slopes), rtol=1e-14, atol=1e-16)
    assert (clipped > 0) == (cliprange is not None)
    assert metrics["value_clip_ratio/sum"] == clipped
    assert metrics["value_loss"] == loss.detach()
    assert metrics["value_clip_ratio/count"] == len(values)


def test_the_critic_s_loss_needs_returns() -> None:
    rollouts = _scored([1.0])
    rollouts[0].values = None
    [batch] = pack(rollouts, max_tokens=1000)
    with pytest.raises(ValueError, match="the batch has none"):
        value_loss(torch.zeros(len(batch.target)), batch, cliprange=None, whole=Denominators(1, 1))
