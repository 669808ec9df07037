"""Peak memory of a case on the CPU, in a process that has run nothing else."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from benchmarks.cases import Case


def fresh_processes(modules: Iterable[str]) -> BaseContext | None:
    """Processes that have imported these modules and done no more; None where there is no Linux to ask for a peak."""
    if sys.platform != "linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def peak_extra_bytes(case: Case, processes: BaseContext) -> int:
    """Bytes resident at the peak of one run beyond those resident before it.

    What the run returns and leaves behind, gradients above all, is counted; weights and inputs are not. The run before
    it, in the same process, has already loaded code and filled the libraries' own caches. BrokenProcessPool when the
    process does not survive: where memory runs out, the system kills it.
    """
    with ProcessPoolExecutor(1, mp_context=processes) as process:
        return process.submit(_measure, case.inputs, case.run).result()


def _measure(make_inputs: Callable[[int], Any], run: Callable[[Any], Any]) -> int:
    run(make_inputs(0))
    inputs = make_inputs(1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages freed but kept would hide what the run needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here: proc(5)
    before = _resident("VmRSS")
    run(inputs)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
