"""Run suites with a progress bar; then a table of what was found, also as results files."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import results
from benchmarks.cases import OURS
from benchmarks.registry import SUITES
from benchmarks.tables import cells, size

_HERE = Path(__file__).parent


@dataclass
class Watch:
    """A pytest plugin: the bar moves on with each case; what failed is kept."""

    bar: Progress
    failures: list[str] = field(default_factory=list)
    _task: Any = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._task = self.bar.add_task("", total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.update(self._task, description=nodeid.partition("[")[2].removesuffix("]") or nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logfinish(self) -> None:
        self.bar.advance(self._task)


def run(suites: Sequence[str], peers: Sequence[str], *, full: bool, folder: Path | None) -> int:
    """Run the suites' cases by pytest-benchmark in this process; 1 when one of ours is wrong or fails, else 0."""
    modules = [str(_HERE / f"{module}.py") for suite in suites for module in SUITES[suite]]
    with tempfile.TemporaryDirectory() as temporary, _screen() as (console, bar):
        kept = folder or Path(temporary)
        arguments = ["-c", str(_HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider", "--benchmark-only"]
        arguments += [*modules, "--results", str(kept), *(["--full"] if full else [])]
        watch, said = Watch(bar), io.StringIO()
        with contextlib.redirect_stdout(said), bar:
            code = pytest.main([*arguments, *(["--peers", *peers] if peers else [])], plugins=[watch])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            console.print(said.getvalue(), markup=False)
            return 1
        rows = [row for found in results.load(kept) for row in found.rows]
    console.print(table(rows))
    for failure in watch.failures:
        console.print(failure, markup=False, style="red")
    if folder:
        console.print(f"results: {folder}")
    return int(code)


@contextlib.contextmanager
def _screen() -> Iterator[tuple[Console, Progress]]:
    """A console and a bar on what is standard error now: pytest takes the stream for itself while a case runs."""
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as stream:
        console = Console(file=stream)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        yield console, Progress(*columns, console=console, transient=True)


def table(rows: list[results.Row]) -> Table:
    """Every row; `x` is the peer's time over ours, at the same size."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "size", "peer", "ms", "p20-p80", "x", "limit", "MB", "note"):
        shown.add_column(name, justify="right" if name in ("ms", "p20-p80", "x", "limit", "MB") else "left")
    last = None
    for row in rows:
        job = (row["op"], size(row))
        if last is not None and job != last:
            shown.add_section()
        style = "bold" if row["peer"] == OURS else None
        shown.add_row(*(("", "") if job == last else job), row["peer"], *cells(row, rows), style=style)
        last = job
    return shown


def run_stages(suites: Sequence[str], folder: Path | None) -> int:
    """On a GPU: the GPU suite's stages named after these suites; its results become `gpu_suite.json`."""
    from benchmarks import gpu_suite

    stages = [stage.name for stage in gpu_suite.STAGES if stage.name.startswith(tuple(suites))]
    if not stages:
        print(f"no stages for {', '.join(suites)} on a GPU")
        return 0
    with tempfile.TemporaryDirectory() as out:
        code = gpu_suite.main(["--out", out, "--stages", "environment", "limits", *stages])
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(out) / "results.json", folder / "gpu_suite.json")
    return code
