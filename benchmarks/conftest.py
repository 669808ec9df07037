"""The runner: a case is checked, then weighed, then timed; `--results DIR` keeps the figures as JSON."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.cases import OURS, Case
from benchmarks.memory import fresh_processes, peak_extra_bytes

_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR", help="write the benchmarks' figures to DIR/<op>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, rows = session.config.getoption("results"), session.config.stash[_ROWS]
    if folder and rows:
        results.write(folder, rows, str(session.config.getoption("benchmark_timer")))


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> BaseContext | None:
    """Fresh processes for the memory figures, with what the chosen cases import already imported."""
    return fresh_processes(
        {item.module.__name__ for item in request.session.items if isinstance(item, pytest.Function)}
    )


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, processes: BaseContext | None) -> Callable[[Case], None]:
    """Run one case. A result that is not right fails here, before anything is timed."""
    rows = request.config.stash[_ROWS]

    def run(case: Case) -> None:
        inputs = case.inputs(0)
        errors = case.errors(inputs, case.run(inputs))  # this run is the warm-up, too
        if case.wrong(errors):
            rows.append(results.row(case, errors, None, None))
            pytest.fail(f"{case.name} is wrong, so it is not timed: {errors}, allowed {case.tolerance}")
        seeds = iter(range(1, case.rounds + 1))
        benchmark.group = case.size
        benchmark.pedantic(case.run, setup=lambda: ((case.inputs(next(seeds)),), {}), rounds=case.rounds)
        if benchmark.disabled:
            return
        peak_bytes = None if processes is None else peak_extra_bytes(case, processes)
        row = results.row(case, errors, benchmark.stats.stats.data, peak_bytes)
        benchmark.extra_info.update(_extra(case, row, rows))
        rows.append(row)

    return run


def _extra(case: Case, row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """What pytest-benchmark keeps beside the times; ours comes after its peers and is compared to them."""
    info = {k: row[k] for k in ("params", "errors", "peak_bytes")}
    info["tokens_per_second"] = round(1e3 * case.tokens / row["ms"]["median"])
    if case.peer == OURS:
        for peer in earlier:
            if peer["ms"] and (peer["op"], peer["params"]) == (row["op"], row["params"]):
                info[f"over_{peer['peer']}"] = _ratios(peer, row)
    return info


def _ratios(peer: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    """Above 1 where ours is better. `min` is what a shared machine disturbs least."""
    ratios = {f"speed_by_{k}": round(peer["ms"][k] / ours["ms"][k], 2) for k in ("median", "min")}
    memory = round(peer["peak_bytes"] / ours["peak_bytes"], 2) if ours["peak_bytes"] else None
    return {**ratios, "memory": memory}
