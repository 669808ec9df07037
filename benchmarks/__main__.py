"""`fastgrpo bench`, also `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_SUITES = ("ops", "update", "rollout", "memory", "train")
_RESULTS = Path(__file__).parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgrpo bench",
        description="Time, memory and correctness of the ops and of training, against the real peers.",
        epilog="Without options: all suites, small sizes, every peer that is installed. Exit code 1 when a result of "
        "ours is wrong (peers may be), when --compare finds ours worse, or when --readme --check finds a difference.",
    )
    add = parser.add_argument
    add("--suite", nargs="+", action="extend", choices=_SUITES, metavar="SUITE", help=f"of {', '.join(_SUITES)}")
    add("--peer", nargs="+", action="extend", metavar="PEER", help="only these and ours (--list names them)")
    add("--case", default="", metavar="WORD", help="only the cases whose name contains this")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="of the CPU (default 1; more wait for one another where other programs run)",
    )
    add("--cpu-time", action="store_true", help="count no turns that other programs had, on a busy machine")
    add("--full", action="store_true", help="the large sizes as well")
    add("--results", type=Path, metavar="DIR", help="write DIR/<op>.json, such as benchmarks/results/cpu-2core")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--list", action="store_true", help="the cases, not run")
    instead(
        "--report", type=Path, nargs="?", const=Path("benchmark-report"), metavar="DIR", help="draw results into DIR"
    )
    add("--from", type=Path, dest="source", metavar="PATH", help="what --report draws (default benchmarks/results)")
    instead("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two results, files or folders")
    instead("--readme", action="store_true", help="write the tables and pictures of README.md from benchmarks/results")
    add("--check", action="store_true", help="with --readme: write nothing, say what differs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or what else is asked for; returns the exit code. ValueError: one line for the user."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.check and not options.readme:
        parser.error("--check goes with --readme")
    if options.source and not options.report:
        parser.error("--from goes with --report")
    if options.results and (options.list or options.report or options.compare or options.readme):
        parser.error("--results is for what is run, and nothing is run here")
    if options.compare:
        from benchmarks.compare import report as compare

        return compare(*options.compare)
    if options.readme:
        from benchmarks.readme import update

        return update(check=options.check)
    if options.report:
        from benchmarks.report import build

        print(build(options.source or _RESULTS, options.report))
        return 0
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    """The device and the threads are settled before torch and the cases are imported."""
    if missing := [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]:
        raise ModuleNotFoundError(f"{missing[0]} is not installed: pip install -c constraints.txt -e '.[bench]'")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    os.environ["FASTGRPO_BENCH_DEVICE"] = device
    from benchmarks import registry, runner

    if unknown := [peer for peer in options.peer or () if peer not in registry.PEERS]:
        raise ValueError(f"--peer: unknown {unknown[0]!r}; there are {', '.join(registry.PEERS)}")
    choice = registry.Choice(options.peer or (), options.full, options.case)
    suites = [suite for suite in registry.SUITES if suite in (options.suite or _SUITES)]
    on_stages = [suite for suite in suites if device == "cuda" and suite not in registry.ON_A_GPU]
    suites = [suite for suite in suites if suite not in on_stages]
    cases = choice.of_suites(suites)
    if options.list:
        for case in cases:
            print(f"{case.name}{'  (absent)' if case.absent else ''}")
        return 0
    if suites and not cases:
        raise ValueError(f"--suite {' '.join(suites)} has no such case (--list names those it has)")
    timer = "time.process_time" if options.cpu_time else "time.perf_counter"
    code = runner.run(suites, choice, options.results, timer) if suites else 0
    if on_stages:
        code = max(code, runner.run_stages(on_stages, options.results))
    return code


if __name__ == "__main__":
    from fastgrpo import cli  # it tells what is the user's in one line

    sys.exit(cli.main(["bench", *sys.argv[1:]]))
