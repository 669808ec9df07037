"""Numbers over steps -> curves that a template can draw: scales, ticks, thinning, moving means, SVG paths.

Pure functions of numpy arrays; what to draw is report.py's decision and how it looks is the templates'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

MAX_POINTS = 600  # of a drawn curve
SPARSE = 30  # a curve of fewer points is readable as it is
BOX = 1000  # width and height of the box that paths are drawn in, y downwards


@dataclass(frozen=True)
class Series:
    """A metric over the run: [n] steps (int64) and [n] values (float64, NaN where the file has null)."""

    steps: np.ndarray
    values: np.ndarray

    @cached_property
    def finite(self) -> np.ndarray:
        """The finite values, in order."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Line:
    """One curve: its path in the box, the path of its moving mean ("" = none), and the drawn points for the reader."""

    label: str
    path: str
    mean_path: str
    dots: bool
    steps: list[int]
    values: list[float | None]
    last: float


@dataclass(frozen=True)
class Chart:
    """What a template needs to draw.

    x_ticks, y_ticks:  (percent from the left or the bottom, label).
    span:              the first and last step of the axis.
    window:            points in the moving mean, 0 = no curve has one.
    description:       the curves in words.
    """

    key: str
    title: str
    unit: str
    note: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    span: tuple[int, int]
    window: int
    description: str

    @property
    def data(self) -> dict[str, Any]:
        """The points, for whoever shows values under the pointer."""
        lines = [{"label": line.label, "steps": line.steps, "values": line.values} for line in self.lines]
        return {"span": self.span, "lines": lines}


def draw(
    key: str, title: str, curves: Mapping[str, Series], span: tuple[int, int], *, unit: str = "", note: str = ""
) -> Chart:
    """A chart of `curves` (label -> series with at least one finite value) over the steps `span`.

    A curve of few points gets dots; one of many is thinned, its extremes kept, and gets a moving mean if it is noisy.
    """
    low, high, y_steps = _value_scale(np.concatenate([series.finite for series in curves.values()]))
    window = max(5, min(200, max(series.steps.size for series in curves.values()) // 25)) // 2 * 2 + 1
    lines = []
    for label, series in curves.items():

        def path(part: Series) -> str:
            x = (part.steps - span[0]) / max(span[1] - span[0], 1) * BOX
            return _path(x, BOX - (part.values - low) / (high - low) * BOX)

        thin = _thin(series)
        mean = path(_thin(Series(series.steps, moving_mean(series.values, window)))) if _noisy(series) else ""
        values = [float(f"{value:.6g}") if math.isfinite(value) else None for value in thin.values.tolist()]
        dots = series.steps.size < SPARSE
        lines.append(Line(label, path(thin), mean, dots, thin.steps.tolist(), values, float(series.finite[-1])))
    gaps = sum(series.values.size - series.finite.size for series in curves.values())
    return Chart(
        key=key,
        title=title,
        unit=unit,
        note="; ".join(filter(None, [note, f"{gaps} not finite" if gaps else ""])),
        window=window if any(line.mean_path for line in lines) else 0,
        lines=lines,
        x_ticks=_step_ticks(*span),
        y_ticks=[((tick - low) / (high - low) * 100, number(tick, digits=5)) for tick in y_steps],
        span=span,
        description=f"{title}: " + "; ".join(_describe(label, series) for label, series in curves.items()),
    )


def _describe(label: str, series: Series) -> str:
    """The curve in words, for those who do not see it."""
    at = series.steps[np.isfinite(series.values)]
    values = series.finite
    return (
        f"{label} {number(values[0])} at step {at[0]}, {number(values[-1])} at step {at[-1]}, "
        f"between {number(values.min())} and {number(values.max())}"
    ).strip()


def _thin(series: Series) -> Series:
    """At most MAX_POINTS + 2 of the points: of each stretch of steps its smallest and its largest value."""
    count = series.steps.size
    if count <= MAX_POINTS:
        return series
    keep = {0, count - 1}
    for start, stop in pairwise(np.linspace(0, count, MAX_POINTS // 2 + 1).astype(int)):
        part = series.values[start:stop]
        if np.isfinite(part).any():
            keep |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        else:
            keep.add(start)  # a gap stays a gap
    index = np.array(sorted(keep))
    return Series(series.steps[index], series.values[index])


def _noisy(series: Series) -> bool:
    """Many points that go up and down: their way is more than three times their range."""
    way = np.abs(np.diff(series.finite)).sum()
    return bool(series.steps.size >= SPARSE and way > 3 * np.ptp(series.finite))


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[n] mean of the finite values among the `window` (odd) around each; NaN where the value itself is NaN."""
    known = np.isfinite(values)
    box = np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), box)[window // 2 :][: values.size]
    counts = np.convolve(known.astype(float), box)[window // 2 :][: values.size]
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; NaN lifts the pen. `h0` makes a point between two gaps visible under a round line cap."""
    parts = []
    down = False
    for at, value in zip(x.tolist(), y.tolist(), strict=True):
        known = math.isfinite(value)
        if known:
            parts.append(f"L{at:.1f} {value:.1f}" if down else f"M{at:.1f} {value:.1f}h0")
        down = known
    return "".join(parts)


def _nice(span: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, so that about `count` of it make up `span`."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _value_scale(values: np.ndarray) -> tuple[float, float, list[float]]:
    """Lowest and highest value of the axis, and its ticks; zero belongs to it where that costs little room."""
    low, high = float(values.min()), float(values.max())
    if 0 <= low < 0.6 * high:
        low = 0.0
    if max(-low, high) < 1e-200:  # nothing but zeros
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * max(-low, high):  # a constant
        low, high = min(0.0, 1.5 * low), max(0.0, 1.5 * high)
    step = _nice(high - low, 4)
    ticks = [index * step for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return ticks[0], ticks[-1], ticks


def _step_ticks(first: int, last: int) -> list[tuple[float, str]]:
    step = max(1, round(_nice(max(last - first, 1), 5)))
    marks = range(math.ceil(first / step) * step, last + 1, step)
    return [((mark - first) / max(last - first, 1) * 100, number(mark, digits=5)) for mark in marks]


def number(value: float | None, digits: int = 3) -> str:
    """For people: 0.613, 4,096, 12.3k, 1e-6; a dash for None or a non-finite value."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e12:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if abs(value) >= 10_000 or not float(value).is_integer():
        value = float(f"{value:.{digits}g}")
    if abs(value) < 10_000:
        return f"{value:,.10g}"
    size, suffix = next((size, name) for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= size)
    return f"{value / size:,.10g}{suffix}"


def duration(seconds: float) -> str:
    """0.44 s, 37 s, 4.2 min, 3.1 h, 2.5 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{number(seconds, digits=2)} s"
