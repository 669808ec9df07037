"""The results files: where and when, once, then a row per case. The GPU suite's are read in the same form."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.limits import Rates

Row = dict[str, Any]

FOLDER = Path(__file__).parent / "results"
"""A folder of files for each machine."""

_ROW = {"case", "op", "peer", "params", "ms", "peak_bytes", "correct"}
_PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "fastgrpo")


def row(
    case: Case,
    errors: dict[str, float] | None = None,
    seconds: Iterable[float] | None = None,
    peak_bytes: int | None = None,
    limit_ms: float | None = None,
    note: str | None = None,
) -> Row:
    """A case's line. `ms` is None when the result was not right, and nothing was timed; a non-finite error is None.

    `note` says why there is no result: absent, out of memory, failed. `correct` is None then.
    """
    ms = None
    if seconds is not None:
        values = np.percentile(list(seconds), [50, 0, 20, 80])
        ms = {name: round(1e3 * float(x), 4) for name, x in zip(("median", "min", "p20", "p80"), values, strict=True)}
    return {
        "case": case.name,
        "op": case.op,
        "peer": case.peer,
        "params": case.params,
        "tokens": case.tokens,
        "ms": ms,
        "rounds": case.rounds,
        "peak_bytes": peak_bytes,
        "flops": case.flops or None,
        "moved_bytes": case.moved or None,
        "limit_ms": limit_ms and float(f"{limit_ms:.4g}"),
        "ratio_to_limit": round(ms["median"] / limit_ms, 3) if ms and limit_ms else None,
        "correct": None if errors is None else not case.wrong(errors),
        "errors": {name: float(f"{e:.2g}") if isfinite(e) else None for name, e in (errors or {}).items()},
        "note": note,
    }


def write(folder: Path, rows: list[Row], header: dict[str, Any]) -> None:
    """One file an op, `<op>.json`, so that a run of some leaves the others' files as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(r["op"] for r in rows):
        results = [r for r in rows if r["op"] == op]
        text = json.dumps({**header, "results": results}, indent=2, allow_nan=False)
        (folder / f"{op}.json").write_text(f"{text}\n")


@dataclass(frozen=True)
class Results:
    """One file: `machine` is its folder's name."""

    machine: str
    header: dict[str, Any]
    rows: list[Row]


def load(path: Path) -> list[Results]:
    """A results file, or every one below a folder, in order. ValueError where there is none, or one that is broken."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(), parse_constant=_no_number)
            if isinstance(content, dict) and isinstance(rows := content.pop("results", None), list):
                found.append(Results(file.absolute().parent.name, content, _checked(content, rows)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as results: {error}") from error
    if not found:
        raise ValueError(f"no results in {path}")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no result")


def _checked(header: dict[str, Any], rows: list[Any]) -> list[Row]:
    """The rows in their common form. ValueError where what tables, pictures and comparisons need is not there."""
    if lacks := {"commit", "date", "versions", "device"} - header.keys():
        raise ValueError(f"it does not say its {min(lacks)}")
    if not rows:
        raise ValueError("it has no rows")
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not row.keys() >= _ROW or not isinstance(row["params"], dict):
            raise ValueError(f"row {i} is not one: it must have {', '.join(sorted(_ROW))}")
        found.append(common(row))
        ms, peak = found[-1]["ms"], found[-1]["peak_bytes"]
        times = [ms.get(name) for name in ("median", "p20", "p80")] if isinstance(ms, dict) else []
        if ms is not None and not (times and all(_is_number(time) and time > 0 for time in times)):
            raise ValueError(f"row {i} ({row['case']}): ms={ms} are no times")
        if peak is not None and not (_is_number(peak) and peak >= 0):
            raise ValueError(f"row {i} ({row['case']}): peak_bytes={peak} is no size")
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and isfinite(x)


def common(row: Row) -> Row:
    """A row of any file in the form that `row` gives; what is not there is None.

    The GPU suite's stages keep `ms`, `p20` and `p80` side by side, errors and words under `error`, and the smaller N
    that fitted into memory beside the one that did not. They do not say what the head's least work is.
    """
    row = {**dict.fromkeys(("tokens", "flops", "moved_bytes", "limit_ms", "ratio_to_limit", "note")), **row}
    if "error" not in row:
        return row
    p20, p80, error = (row.pop(name, None) for name in ("p20", "p80", "error"))
    if row["ms"] is not None:
        row["ms"] = {"median": row["ms"], "p20": p20, "p80": p80}
    row["errors"], row["note"] = error if isinstance(error, dict) else {}, error if isinstance(error, str) else None
    if row.get("N_measured"):
        row["params"] = {**row["params"], "N": row["N_measured"]}
    if row["op"] == "linear_grpo_loss" and {"N", "D", "V"} <= row["params"].keys():
        N, D, V = (row["params"][name] for name in "NDV")
        gemms, gradients = (3, 2) if row["params"].get("trainable", True) else (2, 1)
        row["flops"], row["moved_bytes"] = 2.0 * gemms * N * D * V, 2.0 * (2 * N * D + gradients * V * D)  # bf16
    return row


def header(device: torch.device, timer: str, rates: Rates | None) -> dict[str, Any]:
    """Commit, date, versions, device, and the measured limits of it."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": timer,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "device": {
            **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1min": round(os.getloadavg()[0], 2),
        },
        "limits": rates and {"gemm_tflops": round(rates.gemm / 1e12, 4), "copy_gb_per_s": round(rates.copy / 1e9, 2)},
    }


def _version(package: str) -> str | None:
    """Of torch the build that is loaded: a CUDA build's package may not say that it is one."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
