"""One case's row: weighed, checked, and timed if it is right. What goes wrong with a peer is a result, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks import results
from benchmarks.cases import OURS, Case
from benchmarks.limits import Rates


def measure(
    case: Case,
    weigh: Callable[[Case], int | None],
    time: Callable[[Case], Sequence[float] | None],
    rates: Callable[[], Rates],
) -> results.Row:
    """weigh: peak bytes of a run, None where nobody can tell; time: seconds of each round, on its own fresh inputs.

    Memory comes first, in another process on a CPU: if it runs out, nothing else has happened. The run that is checked
    is the warm-up, too. A row without times says why in `note`, or is not `correct`. What our own ops raise is raised.
    """
    try:
        if case.absent:
            raise ModuleNotFoundError(f"{case.needs} is not installed")
        peak_bytes = weigh(case) if case.weighed else None
        inputs = case.inputs(0)
        errors = case.errors(inputs, case.run(inputs))
        del inputs
        if case.wrong(errors):
            return results.row(case, errors)
        seconds = time(case) if case.rounds else None
    except Exception as error:
        if case.peer == OURS and not out_of_memory(error):
            raise
        return results.row(case, note=_word(error))
    limit = rates().limit_ms(case.flops, case.moved) if case.flops or case.moved else None
    return results.row(case, errors, seconds, peak_bytes, limit)


def out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has a type for it, torch's CPU allocator only words; a process may also be killed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, BrokenProcessPool)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _word(error: Exception) -> str:
    if isinstance(error, BrokenProcessPool):
        return "out of memory, as it seems: its process was ended"
    if out_of_memory(error):
        return "out of memory"
    kind = "absent" if isinstance(error, ImportError) else f"failed: {type(error).__name__}"
    return f"{kind}: {' '.join(str(error).split())[:200]}"
