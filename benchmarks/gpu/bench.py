"""What a stage works with: the device, the rows it found (kept on disk after each), clocks and peak memory."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import clock, peak_allocated_bytes

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a stage may be killed at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


@dataclass
class Bench:
    """One stage's run. small: tiny shapes, so that a CPU can do the same."""

    stage: str
    out: Path
    device: torch.device
    small: bool
    rows: list[Row] = field(default_factory=list)

    def add(self, case: str, op: str, peer: str, params: dict[str, Any], **found: Any) -> Row:
        """Keep one row. A row that is not correct loses its times: no speed for wrong results."""
        row: Row = {"case": case, "op": op, "peer": peer, "params": params}
        row |= dict.fromkeys(("ms", "p20", "p80", "peak_bytes", "limit_ms", "ratio_to_limit", "required", "reached"))
        row |= {"correct": None, "error": None, "stage": self.stage} | found
        if row["correct"] is False:
            row |= dict.fromkeys(("ms", "p20", "p80", "ratio_to_limit"))
            row["reached"] = False
        self.rows.append(_finite(row))
        write_json(self.out / f"{self.stage}.json", self.rows)
        return row

    def attempt(self, case: str, op: str, peer: str, params: dict[str, Any], run: Callable[[], Row]) -> None:
        """`run` gives what `add` keeps. What it raises is a row, too: running out of memory is a result."""
        try:
            found = run()
        except torch.cuda.OutOfMemoryError:
            found = {"error": "out of memory"}
        except ImportError as error:
            found = {"error": f"absent: {error}"}
        except Exception as error:  # one case must not take the others with it
            found = {"correct": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        self.add(case, op, peer, params, **found)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free(self) -> None:
        """Let go of what the case before has left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def earlier(self, stage: str) -> list[Row]:
        """The rows of a stage that ran before, none if it did not."""
        path = self.out / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else []

    def times(self, runs: Sequence[Callable[[], Any]], rounds: int = 9, warmup: int = 2) -> Row:
        """ms, p20, p80 of one call; the callables differ in their inputs and take turns."""
        rounds, warmup = (2, 1) if self.small else (rounds, warmup)
        for i in range(max(warmup, len(runs))):
            runs[i % len(runs)]()
        found = [self._one(runs[i % len(runs)]) for i in range(rounds)]
        values = np.percentile(found, [50, 20, 80])
        return {name: round(float(x), 4) for name, x in zip(("ms", "p20", "p80"), values, strict=True)}

    def _one(self, run: Callable[[], Any]) -> float:
        now = clock(self.device)
        start = now()
        run()
        return 1e3 * (now() - start)

    def peak_bytes(self, run: Callable[[], int]) -> int | None:
        """Bytes allocated at the peak beyond those before and beyond what `run` says it returned. None on a CPU."""
        if self.device.type != "cuda":
            return None
        returned: list[int] = []
        return peak_allocated_bytes(lambda: returned.append(run())) - returned[0]


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
