"""Prompts -> scored rollouts: draw, sample, score, and draw again for groups without a signal (DAPO).

Every process draws all prompts, samples and scores its share, and gets those of the others.
"""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastgrpo.advantages import assign_advantages, group_signal
from fastgrpo.config import GRPOConfig
from fastgrpo.data import PromptSource
from fastgrpo.distributed import Ranks
from fastgrpo.records import Prompt, Rollout, RolloutBatch, Sampling, TrainState, digest
from fastgrpo.rewards import (
    OverlappedScoring,
    RewardReport,
    RewardRunner,
    merged,
    raise_if_all_failed,
    reward_statistics,
)
from fastgrpo.rollout import Engine
from fastgrpo.seeding import derive_seed

_Sampled = tuple[list[Rollout], OverlappedScoring | None]


class Collector:
    """Makes one rollout batch after another; `state` says where in the data it stands, and is moved on."""

    def __init__(
        self,
        source: PromptSource,
        engine: Engine,
        rewards: RewardRunner,
        config: GRPOConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.source = source
        self.engine = engine
        self.rewards = rewards
        self.config = config
        self.ranks = ranks or Ranks()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._ahead: Future[_Sampled] | None = None

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
        self.ranks.together("all rewards", lambda: raise_if_all_failed(drawn, failures))
        state.batches_done += 1
        state.num_tokens += sum(len(r.prompt.token_ids) + r.num_tokens for r in drawn)
        assign_advantages(kept, {f.name: f.weight for f in self.rewards.functions}, config)
        metrics = logged | reward_statistics(drawn) | batch_metrics(drawn) | clock
        metrics["sampling/staleness"] = statistics.fmean(self.engine.version - r.weights_version for r in drawn)
        if config.dynamic_sampling:
            metrics["dynamic_sampling/rounds"] = rounds
            metrics["dynamic_sampling/dropped_groups"] = (len(drawn) - len(kept)) / config.num_generations
        return RolloutBatch(kept, metrics)

    def close(self) -> None:
        """Forget the batch that is being sampled ahead; its thread ends with the engine."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sample_and_score(
        self, count: int, attempt: int, state: TrainState, trainer_state: Any, clock: dict[str, float]
    ) -> tuple[list[Rollout], RewardReport]:
        started = time.perf_counter()
        prompts, state.prompts_drawn = self.source.draw(state.prompts_drawn, count)
        self.ranks.same("prompts, by train_dataset or its order", lambda: digest(prompts))
        begin, share = self.ranks.share(prompts, by_first=self.config.rollouts_by_first)

        def stage() -> tuple[list[Rollout], RewardReport, float]:
            if self._ahead is None:
                sampling = self._sampling(state.batches_done, attempt, begin)
                rollouts, scoring = self._generate(share, sampling, trainer_state)
            else:
                rollouts, scoring = self._ahead.result()
            generated = time.perf_counter()
            if self.config.async_rollouts:
                self._begin_ahead(state, trainer_state)
            report = scoring.finish() if scoring else self._score(rollouts, trainer_state)
            for r in rollouts:
                r.group += begin
            return rollouts, report, generated - started

        parts = self.ranks.together("rollouts and rewards", stage, cuttable=True)
        rollout_time = max(seconds for _, _, seconds in parts)
        clock["perf/rollout_time"] += rollout_time
        clock["perf/reward_time"] += time.perf_counter() - started - rollout_time
        rollouts = [r for part, _, _ in parts for r in part]
        if self.ranks.alone:
            return rollouts, parts[0][1]
        return rollouts, merged([report for _, report, _ in parts], [len(part) for part, _, _ in parts])

    def _sampling(self, batch: int, attempt: int, first_group: int) -> Sampling:
        config = self.config
        return Sampling(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=derive_seed(config.seed, "rollout", batch, attempt),
            stop_token_ids=tuple(config.stop_token_ids),
            stop_strings=tuple(config.stop_strings),
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            first_group=first_group,
        )

    def _score(self, rollouts: list[Rollout], trainer_state: Any) -> RewardReport:
        return self.rewards.score(rollouts, trainer_state=trainer_state, all_may_fail=True)

    def _generate(self, prompts: list[Prompt], sampling: Sampling, trainer_state: Any) -> _Sampled:
        """The rollouts, and who scores them since each group was complete; None = nobody yet."""
        if not self.config.overlap_rewards:
            return self.engine.generate(prompts, self.config.num_generations, sampling), None
        scoring = OverlappedScoring(self.rewards, trainer_state)
        try:
            return self.engine.generate(prompts, self.config.num_generations, sampling, scoring.add), scoring
        except BaseException:
            scoring.close()
            raise

    def _begin_ahead(self, state: TrainState, trainer_state: Any) -> None:
        """Sample the next batch in a thread, from the weights as they are and as they come to be.

        Nothing of it enters `state`: a run that goes on from a checkpoint samples the batch anew.
        """
        prompts, _ = self.source.draw(state.prompts_drawn, self.config.num_prompts_per_step)
        begin, share = self.ranks.share(prompts, by_first=self.config.rollouts_by_first)
        sampling = self._sampling(state.batches_done + 1, 1, begin)
        self._ahead = self._threads.submit(self._generate, share, sampling, trainer_state)


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
