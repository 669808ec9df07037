"""A case: one peer doing one job on one size of input. What the runner in conftest.py needs to know of it.

`python -m benchmarks.cases MODULE` times a module's cases by turns, and those of its MORE, too long for every run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import end, positive

OURS = "fastgrpo"
"""The peer that the others are compared with."""

DEVICE = torch.device(os.environ.get("FASTGRPO_BENCH_DEVICE", "cpu"))
"""Where the ops' cases run and how large they are: bf16 and GPU sizes on cuda, fp32 and small ones on a CPU."""


@dataclass(frozen=True)
class Case:
    """One row of the results.

    op:        the job; peers doing the same job on the same params are compared, and a results file holds one op.
    peer:      who does it.
    params:    the size, JSON values only.
    tokens:    tokens one run handles, for tokens per second.
    inputs:    seed -> fresh random inputs; not timed.
    run:       inputs -> result; timed. A function of a module, so that a fresh process can find it.
    errors:    (inputs, result) -> how wrong the result is, by name.
    tolerance: the largest error of each name that still counts as right.
    rounds:    timed runs, each on its own inputs; 0: memory alone.
    needs:     the package without which the peer is absent.
    weighed:   whether its peak memory is measured, by two more runs in a process of its own.
    flops:     what no way to do the job can leave out, in floating-point operations,
    moved:     and in bytes read and written: with the measured rates, the limit that times are held against.
    """

    op: str
    peer: str
    params: dict[str, Any]
    tokens: int
    inputs: Callable[[int], Any]
    run: Callable[[Any], Any]
    errors: Callable[[Any, Any], dict[str, float]]
    tolerance: dict[str, float]
    rounds: int = 5
    needs: str | None = None
    weighed: bool = True
    flops: float = 0.0
    moved: float = 0.0

    @property
    def absent(self) -> bool:
        """Its package is not installed."""
        return self.needs is not None and find_spec(self.needs) is None

    @property
    def size(self) -> str:
        """The job and its size, the same for all peers."""
        return f"{self.op}[{','.join(f'{k}={v}' for k, v in self.params.items())}]"

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.size}-{self.peer}"

    @property
    def module(self) -> str:
        """Where CASES holds this case."""
        return self.run.__module__

    def wrong(self, errors: dict[str, float]) -> dict[str, float]:
        """The errors above their tolerance; NaN is."""
        return {name: error for name, error in errors.items() if not error <= self.tolerance[name]}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def clipped_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, epsilon: float = 0.2) -> Tensor:
    """Sum over the tokens of the clipped surrogate -min(w A, clip(w) A), as in the papers; all arguments [N]."""
    ratio = (logprob - old_logprob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).sum()


def interleaved(cases: Sequence[Case], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds, by `clock`, of each case in each round, after checking all of them; raises ValueError when one is wrong.

    A round runs every case once, on inputs of the same seed: a burst of other work does not hit one of them alone, and
    the rounds' own ratios may be compared.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for seed in range(rounds + 1):
        for case, times in zip(cases, seconds, strict=True):
            inputs = case.inputs(seed)
            started = clock()
            result = case.run(inputs)
            if seed:
                times.append(clock() - started)
            elif wrong := case.wrong(case.errors(inputs, result)):
                raise ValueError(f"{case.name} is wrong: {wrong}, allowed {case.tolerance}")
    return seconds


def main() -> None:
    """Per size: seconds, and what ours is faster by, by minimum, median, and median of the rounds' own ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=main.__doc__)
    parser.add_argument("module", help="such as benchmarks.test_update")
    parser.add_argument("-k", dest="word", default="", help="only the sizes that contain this")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count no turns that other programs had")
    arguments = parser.parse_args()
    module = importlib.import_module(arguments.module)
    if not hasattr(module, "CASES"):
        parser.error(f"{arguments.module} has no CASES")
    every = [*module.CASES, *getattr(module, "MORE", [])]
    chosen = [case for case in every if arguments.word in case.size and not case.absent]
    if not chosen:
        parser.error(f"-k {arguments.word}: no such size in {arguments.module}")
    for size, group in groupby(chosen, key=lambda case: case.size):
        cases = list(group)
        seconds = interleaved(cases, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
        kind = "CPU" if arguments.cpu_time else "wall"
        print(f"{size}\n  {kind} time, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.2f}")
        ours = next(times for case, times in zip(cases, seconds, strict=True) if case.peer == OURS)
        for case, times in zip(cases, seconds, strict=True):
            each = statistics.median(a / b for a, b in zip(times, ours, strict=True))
            low, middle = (f(times) / f(ours) for f in (min, statistics.median))
            print(
                f"  {case.peer:12} min {min(times):7.3f} s, median {statistics.median(times):7.3f} s; "
                f"over ours: min {low:.3f}, median {middle:.3f}, round by round {each:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    end(main)
