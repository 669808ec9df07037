"""How an LM head's work is cut and ordered: chosen from shapes, what the loss looks at, and what wants a gradient.

Schedules, over windows of rows:
- `forward`: log-probs only. 1 GEMM.
- `fused`: a window's gradients follow its log-probs while its logits are at hand. 3 GEMMs, 2 with a frozen weight.
  Every window must hold all that its rows' coefficients depend on: any rows, whole sequences, or the batch.
- `per_row`: frozen weight, no entropy gradient: dlogp/dhidden of each row while its logits are at hand, times the
  coefficients when all of those are known. 2 GEMMs whatever the loss depends on.
- `recomputed`: log-probs of everything, then the logits again. One GEMM more than fused.

Methods, from hidden states to the rows of dL/dlogits, on a device (PyTorch's path has `two_read` only):
- `epilogue`: our GEMM writes exp(logits) as bf16 and sums the rows as it goes; fp32 logits never leave registers.
- `single_read`: cuBLAS writes fp32 logits of `logit_rows` rows, one pass turns them into gradient rows.
- `two_read`: the same with two passes: for gradients of the entropy, and for dtypes other than bf16.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch

from ..gradients import PART
from ..vocabulary import BLOCK_ELEMENTS

HOST_LOGITS = 64 << 20
"""Bytes of a window's logits on the CPU."""

HOST_SEQUENCE_LOGITS = 256 << 20
"""Bytes they may grow to when a loss needs whole sequences in a window."""

VOCAB_TILE = 2048
"""Columns of a CPU's GEMM: on two Zen 4 cores 1.9x faster than one call over V = 50257, whose rows thrash the cache."""

DEVICE_GRADIENTS = 3 << 30
"""Bytes of gradient rows held at a time on a device with a trainable weight: fewer chunks, less traffic to dW."""

DEVICE_GRADIENTS_FROZEN = 512 << 20
"""The same with a frozen one, where some 2000 rows already fill the GEMMs."""

DEVICE_LOGITS = 320 << 20
"""Bytes of fp32 logits held at a time on a device by `single_read` and `two_read`."""

STATISTICS_ROWS = 1 << 16
"""Rows of one launch that writes sums only."""

ROW_TILE = 128
"""Windows on a device are multiples of it, where the sequences allow."""

# The cost model, for an H200 (measured there: 790 TFLOP/s of bf16, 4.3 TB/s of copies; efficiencies are predictions).
_GEMM_RATE, _BANDWIDTH, _EPILOGUE_EFFICIENCY = 750e12, 3.65e12, 0.85

Method = Literal["epilogue", "single_read", "two_read"]
Reach = Literal["token", "sequence", "batch", "unknown"]
_LOG = logging.getLogger(__name__)
_WATCHING: ContextVar[list[HeadPlan] | None] = ContextVar("watching", default=None)


@dataclass(frozen=True)
class HeadProblem:
    """What a plan is made from.

    dtype: of the GEMMs' operands. trainable: a sum over rows (weight, bias, LoRA's b) wants a gradient; differentiable:
    anything does. reach: what a row's coefficients depend on, `unknown` when they come later, from outside.
    tensor_copies: the GPU and the shapes suit the epilogue's kernel. thin: what is trainable costs no GEMM of
    [N, D, V]: a bias or LoRA.
    """

    num_rows: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    trainable: bool
    differentiable: bool
    entropy_gradient: bool
    reach: Reach
    on_device: bool
    tensor_copies: bool
    thin: bool = False


@dataclass(frozen=True)
class HeadPlan:
    """schedule, method: see above. windows: slices of the rows, in order. chunk_rows: gradient rows held at a time.
    logit_rows: rows of fp32 logits held at a time, 0 when they are never written. gemms: of [N, D, V]. reason: why.
    """

    schedule: Literal["forward", "fused", "per_row", "recomputed"]
    method: Method
    windows: list[slice]
    chunk_rows: int
    logit_rows: int
    gemms: int
    reason: str


@contextlib.contextmanager
def watch_plans() -> Iterator[list[HeadPlan]]:
    """Collects the plan of every call of `linear_logprob` and `linear_grpo_loss` in the block, in order."""
    plans: list[HeadPlan] = []
    token = _WATCHING.set(plans)
    try:
        yield plans
    finally:
        _WATCHING.reset(token)


def plan_head(
    problem: HeadProblem,
    bounds: Callable[[], list[int]] | None = None,
    chunk_size: int | None = None,
    schedule: str = "",
    watched: bool = True,
) -> HeadPlan:
    """The plan for a problem.

    bounds: tells the sequences' boundaries, [S+1]; asked only where a plan turns on them; None = not to be had.
    chunk_size: rows of a window, in place of those that a budget allows.
    schedule: a method, or `recomputed`; "" = choose.
    watched: `watch_plans` shows it; not so the second half of a plan that it has shown.
    Errors: ValueError naming the schedule that cannot be had, and why.
    """
    method, why = _method(problem, "" if schedule == "recomputed" else schedule)
    rows = chunk_size or _affordable_rows(problem, method)
    chosen, windows, because = _schedule(problem, method, rows, bounds, chunk_size, schedule)
    width = max((window.stop - window.start for window in windows), default=0)
    logit_rows = {"epilogue": 0, "two_read": width}.get(method, min(_logit_rows(problem), rows))
    plan = HeadPlan(
        schedule=chosen,
        method=method,
        windows=windows,
        chunk_rows=max(width, min(rows, problem.num_rows)),
        logit_rows=logit_rows,
        gemms=1 + problem.differentiable + (problem.trainable and not problem.thin) + (chosen == "recomputed"),
        reason=f"{method}: {why}; {chosen}: {because}",
    )
    _LOG.debug("N=%d V=%d: %s", problem.num_rows, problem.vocab_size, plan)
    watching = _WATCHING.get()
    if watched and watching is not None:
        watching.append(plan)
    return plan


def head_bytes(problem: HeadProblem, plan: HeadPlan) -> int:
    """What the head allocates at most beside its inputs, gradients that it hands out included: large tensors alone.

    In the forward a chunk and its logits, copies of its hidden states, and the fp32 gradients of hidden states and,
    where it trains, of the weight; in the backward those and their copies in the operands' dtype.
    """
    rows, hidden_size, vocab_size = problem.num_rows, problem.hidden_size, problem.vocab_size
    wide = 8 if problem.dtype == torch.float64 else 4
    gradients = rows * hidden_size + vocab_size * hidden_size * (problem.trainable and not problem.thin)
    gradients *= problem.differentiable
    chunk = min(plan.chunk_rows, rows)
    if problem.on_device:
        vocab_size = _padded_vocab(problem)
        chunked = plan.chunk_rows * vocab_size * problem.dtype.itemsize * problem.differentiable
        copies = 6 * chunk * hidden_size * problem.differentiable
        buffers = chunked + plan.logit_rows * vocab_size * 4 + copies
    else:
        chunk = max((window.stop - window.start for window in plan.windows), default=0)
        copies = (chunk * (1 + problem.differentiable) + min(VOCAB_TILE, vocab_size)) * hidden_size
        scratch = 2 * min(BLOCK_ELEMENTS, chunk * vocab_size)  # of the passes over logits, which no copies outlive
        buffers = (chunk * vocab_size + max(copies, scratch)) * wide
    handed_out = (wide + problem.dtype.itemsize) * gradients
    if not problem.on_device and problem.dtype.itemsize < wide:
        handed_out += wide * min(PART, gradients)
    return max(buffers + wide * gradients, handed_out)


def _method(problem: HeadProblem, asked: str) -> tuple[Method, str]:
    if not problem.on_device:
        if asked not in ("", "two_read"):
            raise ValueError(f"schedule: expected two_read, recomputed or None without a GPU, got {asked!r}")
        return "two_read", "PyTorch's path"
    if asked == "epilogue" and not problem.tensor_copies:
        raise ValueError("schedule: expected another than 'epilogue', which needs bf16 rows of a multiple of 16 bytes")
    exact = problem.entropy_gradient or (problem.differentiable and problem.dtype != torch.bfloat16)
    if asked in ("epilogue", "single_read") and exact:
        raise ValueError(
            f"schedule: expected two_read or recomputed for an entropy gradient or a dtype other than bfloat16, "
            f"got {asked!r}"
        )
    if asked:
        return cast(Method, asked), "asked for"
    if exact:
        return "two_read", "entropy gradient" if problem.entropy_gradient else f"{problem.dtype} gradients"
    if problem.tensor_copies:
        gemm = 2 * problem.hidden_size / _GEMM_RATE  # seconds of a logit
        slower_gemm, extra_pass = gemm * (1 / _EPILOGUE_EFFICIENCY - 1), 6 / _BANDWIDTH
        if not problem.differentiable or slower_gemm <= extra_pass:
            return "epilogue", "cheaper than a pass over the logits, by the cost model"
        return "single_read", "cheaper than a slower GEMM, by the cost model"
    return "single_read" if problem.dtype == torch.bfloat16 else "two_read", "no tensor copies here"


def _schedule(
    problem: HeadProblem,
    method: str,
    rows: int,
    bounds: Callable[[], list[int]] | None,
    chunk_size: int | None,
    asked: str,
) -> tuple[Literal["forward", "fused", "per_row", "recomputed"], list[slice], str]:
    if method == "two_read" and problem.reach == "token" and problem.on_device:
        rows = min(rows, _logit_rows(problem))  # the gradient rows of several windows make a chunk
    even = even_windows(problem.num_rows, rows, ROW_TILE if problem.on_device and chunk_size is None else 1)
    if not problem.differentiable:
        return "forward", even, "no gradient is wanted"
    if asked == "recomputed":
        return "recomputed", even, "asked for"
    frozen = not problem.trainable and not problem.entropy_gradient
    if problem.reach == "unknown":
        if not frozen:
            return "recomputed", even, "the loss is not known here"
        return "per_row", even, "the weight is frozen"
    if len(even) == 1:
        return "fused", even, "all rows fit a window"
    if problem.reach == "token":
        return "fused", even, "a token's gradient depends on itself"
    if frozen:
        return "per_row", even, "the weight is frozen"
    if problem.reach == "batch":
        return "recomputed", even, "the gradient depends on all rows, which exceed a window"
    if bounds is None:
        return "recomputed", even, "the sequences' boundaries cannot be read now"
    known = bounds()
    longest = max(b - a for a, b in pairwise(known))
    size = _grown(problem, rows, longest) if chunk_size is None else rows
    if longest > size:
        return "recomputed", even, f"a sequence of {longest} tokens exceeds a window of {size}"
    return "fused", sequence_windows(known, size), "every sequence fits a window"


def _padded_vocab(problem: HeadProblem) -> int:
    return -(-problem.vocab_size // 64) * 64


def _affordable_rows(problem: HeadProblem, method: str) -> int:
    """Rows whose logits, or gradient rows, fit the budget."""
    if not problem.on_device:
        wide = 8 if problem.dtype == torch.float64 else 4
        return max(1, HOST_LOGITS // (problem.vocab_size * wide))
    if method == "epilogue" and not problem.differentiable:
        return STATISTICS_ROWS
    if not problem.differentiable:
        return _logit_rows(problem)
    budget = DEVICE_GRADIENTS if problem.trainable else DEVICE_GRADIENTS_FROZEN
    row = problem.dtype.itemsize
    if method == "two_read" and problem.reach != "token":
        row += 4  # a window's fp32 logits are held as long as its gradient rows
    return _tiled(budget // (_padded_vocab(problem) * row))


def _logit_rows(problem: HeadProblem) -> int:
    return _tiled(DEVICE_LOGITS // (_padded_vocab(problem) * 4))


def _tiled(rows: int) -> int:
    return max(1, rows // ROW_TILE) * ROW_TILE


def _grown(problem: HeadProblem, rows: int, longest: int) -> int:
    """A host window may grow to hold the longest sequence; a device's are large already."""
    if problem.on_device:
        return rows
    wide = 8 if problem.dtype == torch.float64 else 4
    return max(rows, longest) if longest * problem.vocab_size * wide <= HOST_SEQUENCE_LOGITS else rows


def even_windows(num_rows: int, rows: int, tile: int = 1) -> list[slice]:
    """Cut num_rows rows into as few windows of at most `rows` as possible, of nearly equal size.

    In whole tiles, where `rows` is a multiple of a tile.
    N = 0 is one empty window, so that its loss is evaluated, too.
    """
    count = max(1, -(-num_rows // rows))
    if rows % tile:
        tile = 1
    tiles = -(-num_rows // tile)
    bounds = [min(tiles * i // count * tile, num_rows) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def sequence_windows(bounds: list[int], rows: int) -> list[slice]:
    """Windows of whole sequences, each filled until the next sequence would not fit `rows`."""
    windows, first = [], 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > rows:
            windows.append(slice(bounds[first], bounds[last]))
            first = last
    return windows
