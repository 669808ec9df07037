"""Peak memory of a case on the CPU, in a process of its own: `python -m benchmarks.memory MODULE CASE` prints bytes."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cases import Case, find

_ROOT = Path(__file__).parents[1]


def peak_extra_bytes(case: Case) -> int | None:
    """Bytes resident at the peak of one run beyond those resident before it; None where there is no Linux to ask.

    What the run returns and leaves behind, gradients above all, is counted; weights and inputs are not. The run before
    it, in the same process, has already loaded code and filled the libraries' own caches.
    """
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "benchmarks.memory", case.module, case.name]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def _measure(case: Case) -> int:
    case.run(case.inputs(0))
    inputs = case.inputs(1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages freed but kept would hide what the run needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here: proc(5)
    before = _resident("VmRSS")
    case.run(inputs)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])
    print(_measure(find(sys.argv[1], sys.argv[2])))
