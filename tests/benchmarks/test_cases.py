"""The cases: what peers give is checked, and what is wrong, absent or out of memory becomes a row without a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import registry, test_attention, test_head, test_logits, test_small_ops
from benchmarks.cases import OURS, Case
from benchmarks.limits import Rates, measure_rates
from benchmarks.measure import measure
from benchmarks.memory import fresh_processes, peak_extra_bytes

_CASES = [
    *test_head.policy_cases("linear_grpo_loss", {"N": 128, "D": 16, "V": 520}, rounds=1),
    *test_head.mean_cases("linear_logprob", {"N": 128, "D": 16, "V": 520}, rounds=1),
    *test_logits.cases(32, 520),
    *test_small_ops.cases(16, 256),
    *test_attention.cases(test_attention.Size(prompt=8, n=3, completion=4)),
]
# Compiling takes a C++ compiler many seconds; `fastgrpo bench` checks those.
_QUICK = [case for case in _CASES if case.peer not in ("torch_compile", "cce")]


def _spoilt(result: Any) -> Any:
    """One value off by a fiftieth."""
    if isinstance(result, tuple):
        return (*result[:-1], _spoilt(result[-1]))
    result = result.clone()
    result.view(-1)[0] += 0.02 * result.abs().max()
    return result


@pytest.mark.parametrize("case", _QUICK, ids=lambda case: case.name)
def test_right_results_are_right_and_spoilt_ones_wrong(case: Case) -> None:
    if case.absent:
        pytest.skip(f"{case.needs} is not installed")
    inputs = case.inputs(0)
    try:
        result = case.run(inputs)
    except ImportError as error:  # torch 2.11 has no head of its own
        assert case.peer == "torch"
        pytest.skip(str(error))
    assert not case.wrong(case.errors(inputs, result))
    assert case.wrong(case.errors(inputs, _spoilt(result)))


@pytest.mark.parametrize("peer", ["naive", OURS])
def test_a_wrong_gradient_of_the_head_is_seen(peer: str) -> None:
    case = next(case for case in _CASES if case.peer == peer)
    inputs = case.inputs(0)
    loss = case.run(inputs)
    inputs.weight.grad[3] *= 1.01
    assert case.wrong(case.errors(inputs, loss)).keys() == {"grad_weight"}


def test_every_case_of_every_suite_is_registered() -> None:
    """Names are unique, peers known, and ours comes last of each size: it is compared with those before."""
    cases = registry.Choice(full=True).of_suites(registry.SUITES)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.peer for case in cases} <= registry.PEERS.keys()
    last = {case.size: case.peer for case in cases}
    assert set(last.values()) == {OURS}
    assert {"naive", "torch_compile", "torch", "trl", "liger", "cce"} <= {case.peer for case in cases}


def test_a_choice_keeps_ours_beside_the_peer() -> None:
    chosen = registry.Choice(["liger"], word="V=8192").of_suites(["ops"])
    assert [case.peer for case in chosen if case.op == "linear_grpo_loss"] == ["liger", OURS]
    assert all("V=8192" in case.name for case in chosen)


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _raise(error: BaseException, _: Any) -> Any:
    raise error


def _fake(peer: str, run: Callable[[Any], Any] = _double, **options: Any) -> Case:
    return Case(
        op="double",
        peer=peer,
        params={"n": 3},
        tokens=3,
        inputs=torch.full((3,), 2.0).add,
        run=run,
        errors=lambda x, result: {"value": (result - 2 * x).abs().max().item()},
        tolerance={"value": 1e-6},
        rounds=2,
        **options,
    )


def _rates() -> Rates:
    return Rates(gemm=1e9, copy=1e6)


def _measured(case: Case) -> dict[str, Any]:
    return measure(case, weigh=lambda _: 4096, time=lambda case: [0.003, 0.001][: case.rounds], rates=_rates)


def test_a_row_has_time_memory_and_the_ratio_to_the_limit() -> None:
    row = _measured(_fake("naive", flops=1e6, moved=500))
    assert row["ms"] == {"median": 2.0, "min": 1.0, "p20": 1.4, "p80": 2.6}
    assert (row["peak_bytes"], row["limit_ms"], row["ratio_to_limit"]) == (4096, 1.0, 2.0)
    assert row["correct"]
    assert row["note"] is None
    assert _measured(replace(_fake("naive"), rounds=0))["ms"] is None


@pytest.mark.parametrize("peer", ["naive", OURS])
def test_a_wrong_result_has_no_time(peer: str) -> None:
    row = _measured(_fake(peer, lambda x: 2.1 * x))
    assert row["correct"] is False
    assert row["ms"] is row["peak_bytes"] is row["limit_ms"] is None
    assert row["errors"]["value"] > 0.1


@pytest.mark.parametrize(
    ("run", "note"),
    [
        (partial(_raise, torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
        (partial(_raise, RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")), "out of memory"),
        (partial(_raise, ImportError("no such kernel")), "absent: no such kernel"),
        (partial(_raise, TypeError("not\n for this")), "failed: TypeError: not for this"),
    ],
)
def test_a_peer_that_fails_is_a_row_that_says_so(run: Callable[[Any], Any], note: str) -> None:
    row = _measured(_fake("naive", run))
    assert (row["note"], row["correct"], row["ms"]) == (note, None, None)


def test_a_real_allocation_that_is_too_large_is_out_of_memory() -> None:
    assert _measured(_fake(OURS, lambda _: torch.empty(1 << 60, dtype=torch.uint8)))["note"] == "out of memory"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_memory_is_weighed_in_a_process_that_may_die() -> None:
    """What a fresh process can find by itself: bytes, and an end as the system makes it where memory runs out."""
    processes = fresh_processes(["benchmarks.memory"])
    assert processes is not None
    weigh = partial(peak_extra_bytes, processes=processes)
    size = 16 << 20
    grown = weigh(replace(_fake("naive"), inputs=size.__add__, run=b"x".__mul__))
    assert grown == pytest.approx(size, rel=0.05)  # to some pages
    row = measure(replace(_fake(OURS), inputs=int, run=os._exit), weigh, lambda _: None, _rates)
    assert row["note"] == "out of memory, as it seems: its process was ended"


def test_an_absent_package_is_named() -> None:
    assert _measured(_fake("naive", needs="no_such_package"))["note"] == "absent: no_such_package is not installed"


def test_what_ours_raises_is_raised() -> None:
    with pytest.raises(TypeError, match="not for this"):
        _measured(_fake(OURS, partial(_raise, TypeError("not for this"))))


def test_rates_are_measured_and_the_slower_part_is_the_limit() -> None:
    ticks = iter(range(1000))
    rates = measure_rates(torch.device("cpu"), lambda: float(next(ticks)), n=32, size=1 << 16)
    assert rates == Rates(gemm=2 * 32**3, copy=2 << 16)  # a second each
    assert _rates().limit_ms(1e6, 5e3) == pytest.approx(5.0)
    assert _rates().limit_ms(0, 0) is None
