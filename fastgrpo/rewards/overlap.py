"""Rewards while generation goes on: groups are scored in threads as they are handed over."""

from __future__ import annotations

import inspect
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastgrpo.records import Rollout
from fastgrpo.rewards.calls import cuda_device, set_cuda_device
from fastgrpo.rewards.runner import RewardReport, RewardRunner, merged

_WAITING_AT_ONCE = 32


class OverlappedScoring:
    """One rollout batch's scoring. A function is called once per group instead of once per batch.

    Groups are scored one after another, so that two sync functions never race for the global random state; many at a
    time when all functions are async and only wait.
    """

    def __init__(self, runner: RewardRunner, trainer_state: Any) -> None:
        self._runner = runner
        self._trainer_state = trainer_state
        waits = all(inspect.iscoroutinefunction(f.fn) for f in runner.functions)
        self._pool = ThreadPoolExecutor(
            _WAITING_AT_ONCE if waits else 1, "reward-group", initializer=set_cuda_device, initargs=(cuda_device(),)
        )
        self._reports: list[Future[RewardReport]] = []

    def add(self, group: list[Rollout]) -> None:
        """Begin to score these completions, in place."""
        self._reports.append(
            self._pool.submit(self._runner.score, group, trainer_state=self._trainer_state, all_may_fail=True)
        )

    def finish(self) -> RewardReport:
        """Wait for what is still being scored, and close. What functions gave to `log_metric` is averaged over groups.

        Raises what scoring a group raised.
        """
        try:
            reports = [future.result() for future in self._reports]
        finally:
            self.close()
        return merged(reports)

    def close(self) -> None:
        """Groups not begun are dropped; one that is being scored ends by its timeout."""
        self._pool.shutdown(wait=False, cancel_futures=True)
