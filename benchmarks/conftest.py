"""The runner: a case is checked, then weighed, then timed; `--results DIR` keeps the figures as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.cases import OURS, Case
from benchmarks.memory import peak_extra_bytes

_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR", help="write the benchmarks' figures to DIR/<op>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, rows = session.config.getoption("results"), session.config.stash[_ROWS]
    if folder and rows:
        results.write(folder, rows)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Run one case. A result that is not right fails here, before anything is timed."""
    rows = request.config.stash[_ROWS]

    def run(case: Case) -> None:
        inputs = case.inputs(0)
        errors = case.errors(inputs, case.run(inputs))
        if case.wrong(errors):
            rows.append(results.row(case, errors, None, None))
            pytest.fail(f"{case.name} is wrong, so it is not timed: {errors}, allowed {case.tolerance}")
        seeds = iter(range(1, case.rounds + 2))
        benchmark.group = case.size
        benchmark.pedantic(
            case.run, setup=lambda: ((case.inputs(next(seeds)),), {}), rounds=case.rounds, warmup_rounds=1
        )
        if benchmark.disabled:
            return
        row = results.row(case, errors, benchmark.stats.stats.data, peak_extra_bytes(case))
        benchmark.extra_info.update(_extra(case, row, rows))
        rows.append(row)

    return run


def _extra(case: Case, row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """What pytest-benchmark's own report shows beside the times; ours comes after its peers and is compared to them."""
    info = {k: row[k] for k in ("params", "errors")}
    info["peak_extra_mb"] = None if row["peak_bytes"] is None else round(row["peak_bytes"] / 1e6, 1)
    info["tokens_per_second"] = round(1e3 * case.tokens / row["ms"]["median"])
    for peer in earlier:
        if case.peer == OURS and peer["ms"] and (peer["op"], peer["params"]) == (row["op"], row["params"]):
            info[f"times_faster_than_{peer['peer']}"] = round(peer["ms"]["median"] / row["ms"]["median"], 2)
            if row["peak_bytes"]:
                info[f"memory_of_{peer['peer']}_over_ours"] = round(peer["peak_bytes"] / row["peak_bytes"], 2)
    return info
