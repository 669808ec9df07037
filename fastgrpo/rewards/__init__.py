"""Reward functions, and the runner that survives them.

Names are imported on first use: the process that checks mathematics imports this package and must start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.rewards.overlap import OverlappedScoring
    from fastgrpo.rewards.registry import RewardDefaults, resolve, resolve_all
    from fastgrpo.rewards.runner import (
        AllRewardsFailed,
        RewardFunction,
        RewardReport,
        RewardRunner,
        merged,
        raise_if_all_failed,
        reward_statistics,
    )

__all__ = [
    "AllRewardsFailed",
    "OverlappedScoring",
    "RewardDefaults",
    "RewardFunction",
    "RewardReport",
    "RewardRunner",
    "merged",
    "raise_if_all_failed",
    "resolve",
    "resolve_all",
    "reward_statistics",
]

_ELSEWHERE = {
    **dict.fromkeys(("RewardDefaults", "resolve", "resolve_all"), "registry"),
    "OverlappedScoring": "overlap",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'runner')}"), name)
