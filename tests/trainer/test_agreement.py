"""The start-up check that engine and trainer agree on the log-probs of what was sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.agreement import EngineDisagrees, check_agreement
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, RolloutBatch, Sampling
from fastgrpo.rollout import make_engine
from fastgrpo.update import Updater


def _sampled(folder: Path, temperature: float = 1.0) -> tuple[Policy, list[Rollout]]:
    policy = load_policy(str(folder), None, GRPOConfig())
    engine, _ = make_engine(GRPOConfig(rollout_engine="loop"), policy)
    prompts = [Prompt(i, "", list(range(10, 14 + i))) for i in range(3)]
    rollouts = engine.generate(prompts, 4, Sampling(max_tokens=6, temperature=temperature))
    for r in rollouts:
        r.reward = 1.0
    return policy, rollouts


def test_the_loop_agrees_to_fp32(tiny_model_dir: Path) -> None:
    for temperature in (1.0, 0.6):
        difference = check_agreement(*_sampled(tiny_model_dir, temperature), GRPOConfig(temperature=temperature))
        assert difference is not None
        assert difference <= 1e-5


def test_another_temperature_or_other_weights_are_found(tiny_model_dir: Path, tiny_untied_model_dir: Path) -> None:
    policy, rollouts = _sampled(tiny_model_dir)
    with pytest.raises(EngineDisagrees, match="Set check_sampling=false"):
        check_agreement(policy, rollouts, GRPOConfig(temperature=0.9))
    other = load_policy(str(tiny_untied_model_dir), None, GRPOConfig())
    with pytest.raises(EngineDisagrees):
        check_agreement(other, rollouts, GRPOConfig())


def test_filters_may_only_raise_log_probs(tiny_model_dir: Path) -> None:
    policy, rollouts = _sampled(tiny_model_dir)
    config = GRPOConfig(top_k=5)
    for r in rollouts:
        r.sampling_logprob = r.sampling_logprob + 0.3  # renormalised over fewer tokens
    assert check_agreement(policy, rollouts, config) == 0.0
    with pytest.raises(EngineDisagrees):
        check_agreement(policy, rollouts, GRPOConfig())
    for r in rollouts:
        r.sampling_logprob = r.sampling_logprob - 0.6
    with pytest.raises(EngineDisagrees):
        check_agreement(policy, rollouts, config)


def test_samples_without_log_probs_are_not_compared(tiny_model_dir: Path) -> None:
    policy, rollouts = _sampled(tiny_model_dir)
    for r in rollouts:
        r.sampling_logprob[0] = torch.nan
    assert check_agreement(policy, rollouts, GRPOConfig()) is None


def test_a_nan_forward_disagrees(tiny_model_dir: Path) -> None:
    policy, rollouts = _sampled(tiny_model_dir)
    with torch.no_grad():
        policy.trainable()[0][1].fill_(torch.nan)
    with pytest.raises(EngineDisagrees, match="nan per token"):
        check_agreement(policy, rollouts, GRPOConfig())


def test_only_the_first_batch_is_checked_and_only_if_wished(tiny_model_dir: Path) -> None:
    def updater(policy: Policy, **options: Any) -> Updater:
        config = GRPOConfig(**options)
        return Updater(policy, None, Optimizer(policy.trainable(), config), config)

    policy, rollouts = _sampled(tiny_model_dir)
    checked = updater(policy)
    checked.prepare(RolloutBatch(rollouts, {}))
    for r in rollouts:
        r.sampling_logprob = r.sampling_logprob - 1
    checked.prepare(RolloutBatch(rollouts, {}))
    updater(policy, check_sampling=False).prepare(RolloutBatch(rollouts, {}))
    with pytest.raises(EngineDisagrees):
        updater(policy).prepare(RolloutBatch(rollouts, {}))


def test_filters_are_warned_about(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    config = GRPOConfig(top_k=20, top_p=0.9)
    [note] = Updater(policy, None, Optimizer(policy.trainable(), config), config).notes()
    assert note.startswith("top_k=20, top_p=0.9: samples come from a narrower distribution")
