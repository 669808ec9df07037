"""The results file: where and when, once, then a row per case."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case

_PACKAGES = ("torch", "transformers", "fastgrpo")


def row(
    case: Case, errors: dict[str, float], seconds: Iterable[float] | None, peak_bytes: int | None
) -> dict[str, Any]:
    """A case's line; `ms` is None when the result was not right, and nothing was timed. A non-finite error is None."""
    ms = None
    if seconds is not None:
        values = np.percentile(list(seconds), [50, 0, 20, 80])
        ms = {name: round(1e3 * float(x), 3) for name, x in zip(("median", "min", "p20", "p80"), values, strict=True)}
    return {
        "case": case.name,
        "op": case.op,
        "peer": case.peer,
        "params": case.params,
        "tokens": case.tokens,
        "ms": ms,
        "rounds": case.rounds,
        "peak_bytes": peak_bytes,
        "correct": not case.wrong(errors),
        "errors": {name: float(f"{e:.2g}") if isfinite(e) else None for name, e in errors.items()},
    }


def write(folder: Path, rows: list[dict[str, Any]], timer: str) -> None:
    """One file an op, `<op>.json`, so that a run of some leaves the others' files as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    header = _header(timer)
    for op in dict.fromkeys(r["op"] for r in rows):
        results = [r for r in rows if r["op"] == op]
        text = json.dumps({**header, "results": results}, indent=2, allow_nan=False)
        (folder / f"{op}.json").write_text(f"{text}\n")


def _header(timer: str) -> dict[str, Any]:
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": timer,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "device": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1min": round(os.getloadavg()[0], 2),
        },
    }


def _commit() -> str | None:
    """The hash, with "-dirty" when tracked files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
