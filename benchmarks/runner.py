"""Run suites with a progress bar; then a table of what was found, also as results files."""

from __future__ import annotations

import contextlib
import io
import os
import signal
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
from benchmarks.command import writable
from benchmarks.registry import SUITES, Choice
from benchmarks.tables import cells, size
from fastgrpo.files import atomic_write

_HERE = Path(__file__).parent


@dataclass(eq=False)
class Watch:
    """A pytest plugin: the bar moves on with each case, or a line is printed in its place; what failed is kept."""

    bar: Progress
    failures: list[str] = field(default_factory=list)
    _task: Any = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._task = self.bar.add_task("", total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        name = nodeid.partition("[")[2].removesuffix("]") or nodeid
        self.bar.update(self._task, description=name)
        if not self.bar.console.is_terminal:
            task = self.bar.tasks[self._task]
            self.bar.console.print(f"{task.completed + 1:.0f}/{task.total:.0f} {name}", markup=False, soft_wrap=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logfinish(self) -> None:
        self.bar.advance(self._task)


def run(suites: Sequence[str], choice: Choice, folder: Path | None, timer: str) -> int:
    """Run the suites' cases by pytest-benchmark in this process; 1 when one of ours is wrong or fails, else 0.

    timer: what pytest-benchmark times with on a CPU, a function's name. Stopped by Ctrl-C or SIGTERM, it shows and
    keeps what it has, and the code is 128 + signal. Where results cannot be kept, ValueError or OSError comes first.
    """
    earlier = _earlier(folder, {case.op for case in choice.of_suites(suites)}) if folder else {}
    modules = [str(_HERE / f"{module}.py") for suite in suites for module in SUITES[suite] if choice.of_name(module)]
    with tempfile.TemporaryDirectory() as kept:
        arguments = ["-c", str(_HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider", "--benchmark-only"]
        arguments += [
            f"--benchmark-timer={timer}",
            *modules,
            f"--results={kept}",
            f"--case={choice.word}",
            f"--peers={','.join(choice.peers)}",
        ]
        said = io.StringIO()
        with _progress() as bar, contextlib.redirect_stdout(said), _terminable() as signals:
            watch = Watch(bar)
            code = pytest.main([*arguments, *(["--full"] if choice.full else [])], plugins=[watch])
        stopped = 128 + (signals or [signal.SIGINT])[0] if code == pytest.ExitCode.INTERRUPTED else 0
        if not any(Path(kept).iterdir()):
            print("stopped before there was a result" if stopped else said.getvalue())
            return stopped or 1
        rows = [row for found in results.load(Path(kept)) for row in found.rows]
        if folder:
            for file in Path(kept).iterdir():
                atomic_write(folder / file.name, file.read_text())
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table(rows))
    for failure in watch.failures:
        console.print(failure, markup=False, style="red")
    if folder:
        console.print(f"results: {folder}")
    for op in dict.fromkeys(row["op"] for row in rows):
        if gone := earlier.get(op, set()) - {row["case"] for row in rows}:
            console.print(f"{op}.json: {len(gone)} rows of an earlier run are no longer in it", markup=False)
    return stopped or int(code)


def _earlier(folder: Path, ops: set[str]) -> dict[str, set[str]]:
    """The cases in the files that will be replaced, by op; the folder is made, and can be written into."""
    files = {op: writable(folder) / f"{op}.json" for op in ops}
    there = {op: results.load(file) for op, file in files.items() if file.exists()}
    return {op: {row["case"] for found in files for row in found.rows} for op, files in there.items()}


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM ends it as Ctrl-C does, so that processes and folders go as well; the signals that came."""
    came: list[int] = []

    def stop(signum: int, _: object) -> None:
        came.append(signum)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on what is standard error now: pytest takes the stream for itself while a case runs."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    with stream, Progress(*columns, console=Console(file=stream), transient=True) as bar:
        yield bar


def table(rows: list[results.Row]) -> Table:
    """Every row; `x` is the peer's time over ours, at the same size."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "size", "peer", "ms", "p20-p80", "x", "limit", "MB", "note"):
        is_number = name in ("ms", "p20-p80", "x", "limit", "MB")
        shown.add_column(name, justify="right" if is_number else "left", no_wrap=name != "size", overflow="fold")
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
    if folder:
        writable(folder)
    with tempfile.TemporaryDirectory() as out, _terminable():
        found = Path(out) / "results.json"
        try:
            return gpu_suite.main(["--out", out, "--stages", "environment", "limits", *stages])
        finally:  # what it had when it was stopped, too
            if folder and found.exists():
                atomic_write(folder / "gpu_suite.json", found.read_text())
