"""Prompts -> scored rollouts: draw, sample, score, and draw again for groups without a signal (DAPO)."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from fastgrpo.advantages import assign_advantages, group_signal
from fastgrpo.config import GRPOConfig
from fastgrpo.data import PromptSource
from fastgrpo.records import Rollout, RolloutBatch, Sampling, TrainState
from fastgrpo.rewards import RewardReport, RewardRunner, raise_if_all_failed, reward_statistics
from fastgrpo.rollout import Engine
from fastgrpo.seeding import derive_seed


class Collector:
    """Makes one rollout batch after another; `state` says where in the data it stands, and is moved on."""

    def __init__(self, source: PromptSource, engine: Engine, rewards: RewardRunner, config: GRPOConfig) -> None:
        self.source = source
        self.engine = engine
        self.rewards = rewards
        self.config = config

    def collect(self, state: TrainState, trainer_state: Any) -> RolloutBatch:
        """One rollout batch with advantages. Raises `AllRewardsFailed` when no sample has a valid reward."""
        config = self.config
        kept: list[Rollout] = []
        drawn: list[Rollout] = []
        clock = {"perf/rollout_time": 0.0, "perf/reward_time": 0.0}
        logged: dict[str, float] = {}
        failures: list[str] = []
        rounds = 0
        while len(kept) < config.samples_per_batch:
            rounds += 1
            missing = config.num_prompts_per_step - len(kept) // config.num_generations
            fresh, report = self._sample_and_score(missing, rounds, state, trainer_state, clock)
            logged |= report.metrics
            failures += report.failures
            last = rounds >= config.dynamic_sampling_max_rounds or not config.dynamic_sampling
            alive = group_signal(fresh)
            for r in fresh:
                r.group += len(drawn)  # groups stay apart over the rounds
            kept += [r for r in fresh if last or alive[r.group - len(drawn)]]
            drawn += fresh
        raise_if_all_failed(drawn, failures)
        state.batches_done += 1
        state.num_tokens += sum(len(r.prompt.token_ids) + r.num_tokens for r in drawn)
        assign_advantages(kept, {f.name: f.weight for f in self.rewards.functions}, config)
        metrics = logged | reward_statistics(drawn) | batch_metrics(drawn) | clock
        if config.dynamic_sampling:
            metrics["dynamic_sampling/rounds"] = rounds
            metrics["dynamic_sampling/dropped_groups"] = (len(drawn) - len(kept)) / config.num_generations
        return RolloutBatch(kept, metrics)

    def _sample_and_score(
        self, count: int, attempt: int, state: TrainState, trainer_state: Any, clock: dict[str, float]
    ) -> tuple[list[Rollout], RewardReport]:
        config = self.config
        started = time.perf_counter()
        prompts, state.prompts_drawn = self.source.draw(state.prompts_drawn, count)
        sampling = Sampling(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=derive_seed(config.seed, "rollout", state.batches_done, attempt),
            stop_token_ids=tuple(config.stop_token_ids),
        )
        rollouts = self.engine.generate(prompts, config.num_generations, sampling)
        generated = time.perf_counter()
        report = self.rewards.score(rollouts, trainer_state=trainer_state, all_may_fail=True)
        clock["perf/rollout_time"] += generated - started
        clock["perf/reward_time"] += time.perf_counter() - generated
        return rollouts, report


def batch_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Figures of all sampled completions: rewards over the valid ones, lengths, how many were cut."""
    valid = [r.reward for r in rollouts if not r.failed]
    by_group: dict[int, list[float]] = {}
    for r in rollouts:
        if not r.failed:
            by_group.setdefault(r.group, []).append(r.reward)
    deviations = [statistics.stdev(v) if min(v) != max(v) else 0.0 for v in by_group.values() if len(v) > 1]
    lengths = [r.num_tokens for r in rollouts]
    return {
        "reward": statistics.fmean(valid) if valid else math.nan,
        "reward_std": statistics.fmean(deviations) if deviations else math.nan,
        "frac_reward_zero_std": statistics.fmean(d == 0.0 for d in deviations) if deviations else math.nan,
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(not r.finished for r in rollouts),
    }
