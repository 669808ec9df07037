"""The cases under pytest-benchmark: `--peers`, `--full`, `--case` choose, `--results DIR` keeps the figures as JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.cases import DEVICE, OURS, Case
from benchmarks.clock import clock, peak_allocated_bytes
from benchmarks.limits import Rates, measure_rates
from benchmarks.measure import measure as measure_case
from benchmarks.memory import fresh_processes, peak_extra_bytes
from benchmarks.registry import Choice

_ROWS = pytest.StashKey[list[results.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR", help="write the benchmarks' figures to DIR/<op>.json")
    parser.addoption("--peers", default="", metavar="A,B", help="only these and ours")
    parser.addoption("--full", action="store_true", help="the large sizes as well")
    parser.addoption("--case", default="", metavar="WORD", help="only the cases whose name contains this")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        options = metafunc.config.option
        choice = Choice(options.peers.split(",") if options.peers else [], options.full, options.case)
        metafunc.parametrize("case", choice.of(metafunc.module), ids=lambda case: case.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        timer = clock(DEVICE)
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=timer))


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, rows = session.config.getoption("results"), session.config.stash[_ROWS]
    if folder and rows:
        timer = "device events" if DEVICE.type == "cuda" else str(session.config.getoption("benchmark_timer"))
        results.write(folder, rows, results.header(DEVICE, timer, _rates() if _rates.cache_info().currsize else None))


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> BaseContext | None:
    """Fresh processes for the memory figures, with what the chosen cases import already imported."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    cases = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    peers = {case.needs for case in cases if isinstance(case, Case) and case.needs and not case.absent}
    return fresh_processes({item.module.__name__ for item in items} | peers)


@cache
def _rates() -> Rates:
    return measure_rates(DEVICE)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, processes: BaseContext | None) -> Callable[[Case], None]:
    """Run one case. A result of ours that is not right fails here, before anything is timed; a peer's is a row."""
    rows = request.config.stash[_ROWS]

    def weigh(case: Case) -> int | None:
        if DEVICE.type == "cuda":
            case.run(case.inputs(0))
            inputs = case.inputs(1)
            return peak_allocated_bytes(lambda: case.run(inputs))
        return None if processes is None or benchmark.disabled else peak_extra_bytes(case, processes)

    def time(case: Case) -> list[float] | None:
        seeds = iter(range(1, case.rounds + 1))
        benchmark.group = case.size
        benchmark.pedantic(case.run, setup=lambda: ((case.inputs(next(seeds)),), {}), rounds=case.rounds)
        return None if benchmark.disabled else benchmark.stats.stats.data

    def run(case: Case) -> None:
        row = measure_case(case, weigh, time, _rates)
        rows.append(row)
        if row["note"]:
            pytest.skip(row["note"])
        if not row["correct"]:
            word = f"{case.name} is wrong, so it is not timed: {row['errors']}, allowed {case.tolerance}"
            pytest.fail(word) if case.peer == OURS else pytest.skip(word)
        if row["ms"]:
            benchmark.extra_info.update({name: row[name] for name in ("params", "errors", "peak_bytes")})
            benchmark.extra_info["tokens_per_second"] = round(1e3 * case.tokens / row["ms"]["median"])

    return run
