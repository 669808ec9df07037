# mypy: disable-error-code="no-untyped-def"
"""The table of the coefficient kernel: a line for each sequence, a column for the loss and for each metric.

A line is a float64 vector of LINE elements, of which the first COLUMNS mean something.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_terms import CLIP_HIGH, CLIP_LOW, LIMIT, clamp, number
from .output import METRICS

COLUMNS = tl.constexpr(1 + len(METRICS))
LINE = tl.constexpr(32)  # COLUMNS rounded up to a power of two
# Columns of the table; where there is a sum, its count is in the next one.
POLICY_LOSS, KL, ENTROPY, LOW, HIGH, REGION, GAP, GAP_MAX, RATIO, RATIO_MIN, RATIO_MAX = (
    tl.constexpr(1 + METRICS.index(name)) for name in METRICS if not name.endswith("/count")
)


@triton.jit
def combine(i_column, a, b):
    """Two lines of the table, or elements of the columns `i_column`, as one; NaN in either stays."""
    lowest = tl.where((a < b) | (a != a), a, b)
    highest = tl.where((a > b) | (a != a), a, b)
    is_max = (i_column == GAP_MAX) | (i_column == RATIO_MAX)
    return tl.where(i_column == RATIO_MIN, lowest, tl.where(is_max, highest, a + b))


@triton.jit
def nothing(i_column):
    """What `_combine` leaves the other as it is with, float64."""
    is_max = (i_column == GAP_MAX) | (i_column == RATIO_MAX)
    empty = tl.where(i_column == RATIO_MIN, float("inf"), tl.where(is_max, float("-inf"), 0.0))
    return empty.to(tl.float64)


@triton.jit
def total(x, counted):
    """float64 sum of the counted elements."""
    return tl.sum(tl.where(counted, x, 0.0).to(tl.float64), 0)


@triton.jit
def count_rows(counted):
    return tl.sum(counted.to(tl.int32), 0).to(tl.float64)


@triton.jit
def put(line, column: tl.constexpr, value):
    return tl.where(tl.arange(0, LINE) == column, value, line)


@triton.jit
def put_mean(line, column: tl.constexpr, value, count):
    """A sum and its count."""
    return put(put(line, column, value), column + 1, count)


@triton.jit
def _put_extreme(line, column: tl.constexpr, extreme, summed):
    """`tl.max` and `tl.min` drop a NaN; a sum of numbers >= 0 is NaN exactly where one of them is."""
    return put(line, column, tl.where(summed == summed, extreme.to(tl.float64), summed))


@triton.jit
def clip_metrics(line, trained, w, A, p_numbers):
    low = count_rows(trained & (w < number(p_numbers, CLIP_LOW)) & (A < 0))
    high = count_rows(trained & (w > number(p_numbers, CLIP_HIGH)) & (A > 0))
    count = count_rows(trained)
    line = put_mean(line, LOW, low, count)
    line = put_mean(line, HIGH, high, count)
    return put_mean(line, REGION, low + high, count)


@triton.jit
def sampling_metrics(line, log_c, c, reported, V: tl.constexpr):
    """Of a block's tokens; a correction of whole sequences comes later, once."""
    gap, count = tl.abs(log_c), count_rows(reported)
    gap_sum = total(gap, reported)
    line = put_mean(line, GAP, gap_sum, count)
    line = _put_extreme(line, GAP_MAX, tl.max(tl.where(reported, gap, float("-inf")), 0), gap_sum)
    if V.corrects_sequences:
        return line
    else:
        if V.correction == "none":
            c = tl.exp(clamp(log_c, -LIMIT, LIMIT))
        c_sum = total(c, reported)
        line = put_mean(line, RATIO, c_sum, count)
        line = _put_extreme(line, RATIO_MIN, tl.min(tl.where(reported, c, float("inf")), 0), c_sum)
        return _put_extreme(line, RATIO_MAX, tl.max(tl.where(reported, c, float("-inf")), 0), c_sum)


@triton.jit
def sequence_correction_metrics(line, correction, length):
    """The correction of a whole sequence counts once, if any of its tokens trains."""
    c, counts = correction.to(tl.float64), length > 0
    line = put_mean(line, RATIO, tl.where(counts, c, 0.0), counts.to(tl.float64))
    line = put(line, RATIO_MIN, tl.where(counts, c, float("inf")))
    return put(line, RATIO_MAX, tl.where(counts, c, float("-inf")))
