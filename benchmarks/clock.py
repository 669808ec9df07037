"""A device's clock, and the peak of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds since some moment: of a CPU the wall's, of a GPU those between device events, its work awaited."""
    return _EventClock() if device.type == "cuda" else time.perf_counter


class _EventClock:
    """Sums the times between its own calls: one event's time since a distant one would be a coarse fp32."""

    def __init__(self) -> None:
        self._now, self._last = 0.0, self._mark()

    def __call__(self) -> float:
        mark = self._mark()
        self._now += self._last.elapsed_time(mark) / 1e3
        self._last = mark
        return self._now

    def _mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        mark.synchronize()
        return mark


def peak_tensor_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes of tensors at the peak of `run` beyond those before it, on any device; on a CPU by PyTorch's profiler."""
    if device.type == "cuda":
        return peak_allocated_bytes(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_allocated_bytes(run: Callable[[], Any]) -> int:
    """Bytes allocated on the GPU at the peak of `run` beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
