"""Rewards while generation goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.collect import Collector
from fastgrpo.config import GRPOConfig
from fastgrpo.policy import load_policy
from fastgrpo.records import Prompt, Rollout, Sampling, TrainState
from fastgrpo.rewards import AllRewardsFailed, RewardFunction, RewardRunner
from fastgrpo.rollout.loop import LoopEngine, burst
from fastgrpo.rollout.loop import engine as loop_engine


class _Engine:
    """Hands its groups over in reverse order and waits after the first until `released`, if there is such an event."""

    version = 0

    def __init__(self, released: threading.Event | None = None) -> None:
        self.released = released

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        groups = [
            [Rollout(p, g, [g + 1, k], torch.zeros(2), finished=True, text=f"{g} {k}") for k in range(n)]
            for g, p in enumerate(prompts)
        ]
        for group in reversed(groups):
            if done:
                done(group)
                if self.released:
                    assert self.released.wait(20), "no group was scored while others were sampled"
        return [r for group in groups for r in group]


class _Source:
    def draw(self, start: int, count: int) -> tuple[list[Prompt], int]:
        return [Prompt(i, "", [1], {"answer": i}) for i in range(count)], start + count


def _collect(
    functions: list[RewardFunction], *, overlap: bool = True, released: threading.Event | None = None, **options: Any
) -> Any:
    config = GRPOConfig(num_prompts_per_step=5, num_generations=3, overlap_rewards=overlap, **options)
    runner = RewardRunner(functions, in_threads=overlap)
    source: Any = _Source()
    engine: Any = _Engine(released)
    batch = Collector(source, engine, runner, config).collect(TrainState(), None)
    runner.close()
    return batch


def _length(completions: list[str], answer: list[int], log_metric: Any, **_: Any) -> list[float | None]:
    log_metric("calls", len(completions))
    return [None if c.endswith("2") and a == 3 else float(c[-1]) + a for c, a in zip(completions, answer, strict=True)]


def test_groups_are_scored_while_others_are_sampled() -> None:
    released = threading.Event()

    def reward(completions: list[str], **_: Any) -> list[float]:
        released.set()
        return [float(c[-1]) for c in completions]

    batch = _collect([RewardFunction("r", reward, timeout=30)], released=released)
    assert [r.reward for r in batch.rollouts] == [0.0, 1.0, 2.0] * 5


def test_groups_of_the_loop_engine_are_scored_while_a_burst_runs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the GPU: once a group was handed over, a burst's tokens come when it has been scored."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = LoopEngine(policy.model, policy.tokenizer, batch_size=3)
    handed, scored = threading.Event(), threading.Event()
    keep, generate = burst.SlotDecoder._keep, engine.generate
    waited: list[bool] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        scored.set()
        return [float(len(c)) for c in completions]

    def await_tokens(self: Any, *args: Any) -> Any:
        if handed.is_set() and not waited:
            waited.append(scored.wait(20))
        return keep(self, *args)

    def hand_over(prompts: list[Prompt], n: int, sampling: Sampling, done: Any) -> list[Rollout]:
        return generate(prompts, n, sampling, lambda group: (done(group), handed.set()))

    monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: None)
    monkeypatch.setattr(burst.SlotDecoder, "_keep", await_tokens)
    monkeypatch.setattr(engine, "generate", hand_over)
    runner = RewardRunner([RewardFunction("r", reward, timeout=30)], in_threads=True)
    source: Any = _Source()
    config = GRPOConfig(num_prompts_per_step=5, num_generations=3, overlap_rewards=True, max_completion_length=9)
    batch = Collector(source, engine, runner, config).collect(TrainState(), None)
    runner.close()
    assert engine.unslotted is None
    assert waited == [True]
    assert [r.reward for r in batch.rollouts] == [float(len(r.text)) for r in batch.rollouts]


def test_the_batch_is_the_one_scored_at_the_end() -> None:
    functions = [RewardFunction("length", _length, timeout=30)]
    first, second = (_collect(functions, overlap=overlap) for overlap in (True, False))
    assert [(r.text, r.rewards, r.advantage) for r in first.rollouts if not r.failed] == [
        (r.text, r.rewards, r.advantage) for r in second.rollouts if not r.failed
    ]
    assert [r.failed for r in first.rollouts] == [r.failed for r in second.rollouts]
    assert sum(r.failed for r in first.rollouts) == 1
    metrics = [{k: v for k, v in b.metrics.items() if not k.startswith("perf/")} for b in (first, second)]
    assert (metrics[0].pop("calls"), metrics[1].pop("calls")) == (3.0, 15.0)  # what a call saw: a group, the batch
    assert metrics[0] == metrics[1]


def test_sync_functions_are_called_one_at_a_time() -> None:
    running, together = [0], []
    lock = threading.Lock()

    def reward(completions: list[str], **_: Any) -> list[float]:
        with lock:
            running[0] += 1
            together.append(running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return [1.0] * len(completions)

    _collect([RewardFunction("r", reward, timeout=30)])
    assert together == [1] * 5


def test_async_functions_wait_together() -> None:
    waiting: list[asyncio.Event] = []

    async def reward(completions: list[str], **_: Any) -> list[float]:
        waiting.append(asyncio.Event())
        if len(waiting) == 5:
            for event in waiting:
                event.set()
        await waiting[-1].wait() if len(waiting) < 5 else None
        await asyncio.gather(*(e.wait() for e in waiting))
        return [1.0] * len(completions)

    batch = _collect([RewardFunction("r", reward, timeout=20)])
    assert all(r.reward == 1.0 for r in batch.rollouts)


def test_failures_are_those_of_the_whole_batch() -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        raise OSError("no network")

    with pytest.raises(AllRewardsFailed, match=r"15 samples has a reward .*no network"):
        _collect([RewardFunction("r", reward, timeout=30)])


def test_a_function_of_the_main_thread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlap_rewards needs a timeout .* 'r' has none"):
        RewardRunner([RewardFunction("r", _length)], in_threads=True)
