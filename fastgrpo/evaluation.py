"""Held-out prompts, sampled and scored: mean reward, accuracy, avg@k, pass@k."""

from __future__ import annotations

import math
import statistics
from typing import Any

from fastgrpo.config import GRPOConfig
from fastgrpo.distributed import Ranks
from fastgrpo.records import Prompt, Rollout, Sampling, digest
from fastgrpo.rewards import RewardRunner
from fastgrpo.rollout import Engine
from fastgrpo.seeding import derive_seed


def evaluate(
    prompts: list[Prompt],
    engine: Engine,
    rewards: RewardRunner,
    config: GRPOConfig,
    trainer_state: Any,
    ranks: Ranks | None = None,
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample `eval_num_generations` completions per prompt and score them; each process of `ranks` its share.

    The same sampling seed every time: two evaluations differ by the weights alone. Failed samples leave every figure
    and are counted in `eval/failed`.
    """
    ranks = ranks or Ranks()
    ranks.same("prompts, by eval_dataset or its order", lambda: digest(prompts))
    begin, share = ranks.share(prompts, by_first=config.rollouts_by_first)
    sampling = Sampling(
        max_tokens=config.eval_max_completion_length or config.max_completion_length,
        temperature=config.eval_temperature or config.temperature,
        seed=derive_seed(config.seed, "eval"),
        stop_token_ids=tuple(config.stop_token_ids),
        stop_strings=tuple(config.stop_strings),
        first_group=begin,
    )

    def stage() -> list[Rollout]:
        own = engine.generate(share, config.eval_num_generations, sampling)
        rewards.score(own, trainer_state=trainer_state, all_may_fail=True)
        for r in own:
            r.group += begin
        return own

    rollouts = [r for part in ranks.together("evaluation", stage, cuttable=True) for r in part]
    return eval_metrics(rollouts, config.eval_num_generations, config.eval_pass_threshold), rollouts


def eval_metrics(rollouts: list[Rollout], k: int, threshold: float) -> dict[str, float]:
    """`eval/reward`, `eval/accuracy` (share of samples that pass), and per prompt `eval/avg@k` and `eval/pass@k`."""
    by_prompt: dict[int, list[bool]] = {}
    for r in rollouts:
        if not r.failed:
            by_prompt.setdefault(r.group, []).append(r.reward >= threshold)
    valid = [r.reward for r in rollouts if not r.failed]
    passed = [p for group in by_prompt.values() for p in group]
    metrics = {
        "eval/reward": statistics.fmean(valid) if valid else math.nan,
        "eval/accuracy": statistics.fmean(passed) if passed else math.nan,
        "eval/mean_length": statistics.fmean(r.num_tokens for r in rollouts),
        "eval/failed": float(sum(r.failed for r in rollouts)),
    }
    if k > 1:
        groups = by_prompt.values()
        metrics[f"eval/avg@{k}"] = statistics.fmean(statistics.fmean(g) for g in groups) if groups else math.nan
        metrics[f"eval/pass@{k}"] = statistics.fmean(any(g) for g in groups) if groups else math.nan
    return metrics
