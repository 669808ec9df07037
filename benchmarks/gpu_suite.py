"""Everything that a GPU must show, in one command, from the source tree: times, memory, errors, tests, peers.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--stages head passes] [--wheels DIR]
    python -m benchmarks.gpu_suite --out DIR --device cpu --small      # the same code, tiny, where there is no GPU

Stages run in order of importance, each in a process of its own with its own time-out: a crash, a hang or an error of
the device in one leaves the others be. Each row is on disk (`DIR/<stage>.json`) as soon as it is known; the whole goes
to `DIR/results.json`, beside each row what the cost model predicts for an H200 (docs/performance.md). Exit 1 if a
required ratio is missed, a result is wrong, a test fails or a stage does not end.
`--wheels` names a folder of wheels (the peers): they are unpacked into a temporary folder, nothing is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import end, writable
from fastgrpo.errors import RunError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """name -> module:function(bench), and the seconds it may take of a budget of nine minutes."""

    name: str
    function: str
    seconds: int


STAGES = (
    Stage("environment", "checks:environment", 30),
    Stage("limits", "limits:limits", 60),
    Stage("tests", "checks:tests", 150),
    Stage("update", "update:update", 330),
    Stage("rollout", "rollout:rollout", 240),
    Stage("train", "algorithms:train", 90),
    Stage("algorithms", "algorithms:algorithms", 150),
    Stage("attention", "attention:attention", 60),
    Stage("numerics", "head:numerics", 80),
    Stage("head", "head:head", 150),
    Stage("passes", "passes:passes", 70),
    Stage("peers", "peers:peers", 120),
    Stage("small_ops", "passes:small_ops", 30),
    Stage("sweep", "sweep:sweep", 300),
)
"""In order of importance; those for which no time is left are cut, and said to be."""


def run_stage(name: str, out: Path, device: str, small: bool) -> None:
    """The inside of a stage's process."""
    import torch

    from benchmarks.gpu.bench import Bench

    stage = next(s for s in STAGES if s.name == name)
    module, function = stage.function.split(":")
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(
        Bench(name, out, torch.device(device), small)
    )


def launch(stage: Stage, args: argparse.Namespace, seconds: float, paths: list[str]) -> str | None:
    """Run one stage; what went wrong, None if nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--stage", stage.name]
    command += ["--out", str(args.out), "--device", args.device, *(["--small"] if args.small else [])]
    old = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *paths, *old])}
    log = args.out / f"{stage.name}.log"
    with log.open("w") as file:
        # A session of its own, so that a time-out ends what the stage started, too.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:  # Ctrl-C and SIGTERM do not reach another session by themselves
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return None if code == 0 else f"exit {code}: {log.read_text()[-2000:]}"


def unpack(wheels: Path, target: str) -> None:
    """RunError where pip cannot."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    if subprocess.run([*command, "--target", target, *map(str, sorted(wheels.glob("*.whl")))]).returncode:
        raise RunError(f"--wheels {wheels}: pip could not unpack them")


def suite(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen stages within the budget; the results file's content."""
    from benchmarks.gpu.bench import write_json
    from benchmarks.gpu.checks import versions
    from benchmarks.gpu.predictions import attach
    from benchmarks.results import _commit, common

    args.out = writable(args.out.resolve())
    deadline = time.monotonic() + 60 * args.minutes
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = {"commit": _commit(), "versions": versions(), "device": args.device, "date": date, "small": args.small}
    found: dict[str, Any] = {**header, "stages": {}, "results": []}

    def keep() -> None:
        write_json(args.out / "results.json", {**found, "results": [common(row) for row in found["results"]]})

    with tempfile.TemporaryDirectory() as site:
        if args.wheels:
            unpack(args.wheels, site)
        for stage in STAGES:
            if stage.name not in args.stages:
                continue
            kept = args.out / f"{stage.name}.json"
            kept.unlink(missing_ok=True)  # an earlier run's
            left, start = deadline - time.monotonic(), time.monotonic()
            fault = "cut: no time was left" if left < 5 else launch(stage, args, min(left, _share(stage, args)), [site])
            rows = json.loads(kept.read_text()) if kept.exists() else []
            found["stages"][stage.name] = {"fault": fault, "seconds": round(time.monotonic() - start, 1)}
            found["results"] += rows
            if stage.name == "environment" and rows:
                found["device"] = rows[0]["params"].get("gpu", args.device)
            keep()
            print(f"{stage.name}: {fault or 'done'}, {len(rows)} rows", flush=True)
    found["results"] = attach(found["results"], args.small)
    keep()
    return found


def _share(stage: Stage, args: argparse.Namespace) -> float:
    return stage.seconds * max(args.minutes / 9, 1 / 3)


def faults(found: dict[str, Any]) -> list[str]:
    """What makes the suite fail."""
    said = [f"{name}: {s['fault']}" for name, s in found["stages"].items() if s["fault"]]
    for row in found["results"]:
        named = f"{row['stage']} {row['case']} {row['op']} {row['peer']} {row['params']}"
        must = row["peer"] in ("fastgrpo", "pytest", "cublas", "copy") or row["op"] == "tests"
        if row["reached"] is False and row["correct"] is not False:
            said.append(f"{named}: required {row['required']}, ratio {row['ratio_to_limit'] or row.get('speed_ratio')}")
        elif must and (row["correct"] is False or isinstance(row["error"], str)):
            said.append(f"{named}: {str(row['error'])[:300]}")
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """Every row with a time, or with a reason for none."""
    header = ["case", "op", "peer", "params", "ms", "predicted ms", "limit", "ratio", "predicted", "required"]
    lines = [[*header, "GB", "note"]]
    for r in rows:
        size = " ".join(f"{k}={v}" for k, v in r["params"].items()) if r["op"] != "environment" else ""
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        note = r["error"][:40].replace("\n", " ") if isinstance(r["error"], str) else ""
        note = "WRONG " + note if r["correct"] is False else "MISSED" if r["reached"] is False else note
        ratio = r["ratio_to_limit"] or r.get("speed_ratio")
        predicted = r.get("predicted_ms"), r.get("predicted_ratio")
        cells = [r["ms"], predicted[0], r["limit_ms"], ratio, predicted[1], r["required"]]
        shown = ["" if c is None else f"{c:.4g}" for c in cells]
        lines.append([r["case"], r["op"], r["peer"][:40], size[:90], *shown, memory, note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        run_stage(args.stage, args.out, args.device, args.small)
        return 0
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu goes with --small: these shapes take hours there")
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes: expected more than 0, got {args.minutes:g}")
    if args.wheels and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: no wheels in {args.wheels}")
    if args.device == "cuda" and not _sees_gpu():
        parser.error("--device cuda: torch sees no GPU here; --device cpu --small runs the same code")
    found = suite(args)
    print(table(found["results"]))
    said = faults(found)
    for line in said:
        print(f"FAIL {line}")
    return 1 if said else 0


if __name__ == "__main__":
    end(main)
