"""Peak memory alone, at sizes whose times would take too long: the head's against N, the update's against the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.cases import Case
from benchmarks.test_head import ON_GPU, policy_cases
from benchmarks.test_update import cases as update_cases

_V, _D = (151936, 1024) if ON_GPU else (50257, 256)
_N, _MORE_N = ((16384, 65536), (131072,)) if ON_GPU else ((1024,), (8192,))


def _head(N: int) -> list[Case]:
    return policy_cases("head_memory", {"N": N, "D": _D, "V": _V}, rounds=0)


def _update(prompts: int) -> list[Case]:
    return [replace(case, op="update_memory", rounds=0) for case in update_cases(prompts)]


CASES = [case for N in _N for case in _head(N)]
MORE = [case for N in _MORE_N for case in _head(N)]
if not ON_GPU:
    CASES += _update(4)
    MORE += [*_update(8), *_update(16)]


def test_memory(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
