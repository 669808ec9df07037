"""Curves and their scales: gaps, means, thinning, and labels for any numbers whatever."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.charts import MAX_POINTS, Series, draw, duration, number


def series(values: list[float], first: int = 1) -> Series:
    return Series(np.arange(first, first + len(values)), np.array(values, float))


def test_a_gap_lifts_the_pen_and_a_lonely_point_is_visible() -> None:
    chart = draw("c", "C", {"": series([0.0, 1.0, math.nan, 1.0, math.nan, 0.0])}, (0, 6))
    assert chart.lines[0].path == "M166.7 1000.0h0L333.3 0.0M666.7 0.0h0M1000.0 1000.0h0"
    assert chart.lines[0].values == [0.0, 1.0, None, 1.0, None, 0.0]
    assert chart.note == "2 not finite"


def test_a_noisy_curve_gets_the_mean_of_its_neighbours() -> None:
    values = [float(i % 10 == 0) for i in range(100)]
    values[50] = math.nan
    chart = draw("c", "C", {"": series(values)}, (0, 100))
    assert chart.window == 5
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", chart.lines[0].mean_path)]
    expected = [1000 - 1000 * np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(100) if i != 50]
    assert heights == pytest.approx(expected, abs=0.06)


def test_a_smooth_or_short_curve_needs_no_mean() -> None:
    warm_up_and_decay = [min(i / 20, 1) * math.cos(i / 70) for i in range(100)]
    for values in (warm_up_and_decay, [3.0] * 100, [0.0, 1.0] * 10):
        chart = draw("c", "C", {"": series(values)}, (0, 100))
        assert chart.window == 0
        assert chart.lines[0].mean_path == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e100, 1e100) | st.just(math.nan), min_size=1, max_size=40))
def test_any_values_give_a_chart_inside_its_box(values: list[float]) -> None:
    if not np.isfinite(values).any():
        values.append(0.0)
    chart = draw("c", "C", {"": series(values)}, (0, len(values)))
    numbers = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", chart.lines[0].path)]
    assert len(numbers) == np.isfinite(values).sum()
    assert all(-0.1 <= y <= 1000.1 for y in numbers)
    assert 2 <= len(chart.y_ticks) <= 12
    assert all(0 <= at <= 100.0001 for at, _ in chart.y_ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.61349, "0.613"), (0, "0"), (1e-6, "1e-6"), (-2.5e-7, "-2.5e-7"), (4096, "4,096"), (12345, "12.3k"),
        (999_999, "1M"), (9999.96, "10k"), (7.2e6, "7.2M"), (3e15, "3e15"), (None, "–"), (math.nan, "–"),
        (-0.5, "-0.5"), (100.0, "100"), (0.30000000000000004, "0.3"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.2, 37.2, 90, 7200, 300_000)] == ["0.2 s", "37 s", "1.5 min", "2.0 h", "3.5 d"]


def test_thinning_keeps_every_extreme_and_the_ends() -> None:
    values = np.zeros(10_000)
    values[[1234, 8765]] = 5.0, -7.0
    values[2000:2500] = np.nan
    line = draw("c", "C", {"": series(values.tolist())}, (0, 10_000)).lines[0]
    at = dict(zip(line.steps, line.values, strict=True))
    assert len(line.steps) <= MAX_POINTS + 2
    assert (at[1235], at[8766]) == (5.0, -7.0)
    assert (line.steps[0], line.steps[-1]) == (1, 10_000)
    assert line.path.count("M") == 2


def test_scales_start_at_zero_where_that_costs_little() -> None:
    def ticks(*values: float) -> list[str]:
        return [label for _, label in draw("c", "C", {"": series(list(values))}, (0, 9)).y_ticks]

    assert ticks(0.4, 0.9) == ["0", "0.5", "1"]
    assert ticks(12_000, 12_900) == ["12k", "12.5k", "13k"]
    assert ticks(-0.03, 0.02) == ["-0.04", "-0.02", "0", "0.02"]
    assert ticks(0, 0) == ["0", "0.5", "1"]
    assert ticks(8, 8, 8) == ["0", "5", "10", "15"]
    assert ticks(-3.5) == ["-6", "-4", "-2", "0"]


def test_step_ticks_are_whole_steps_inside_the_axis() -> None:
    for span in ((0, 1), (0, 3), (0, 80), (990, 1000), (0, 123_456), (7, 8)):
        chart = draw("c", "C", {"": Series(np.array([span[1]]), np.array([1.0]))}, span)
        assert 2 <= len(chart.x_ticks) <= 8
        assert all(0 <= at <= 100 and "." not in label.replace("k", "") for at, label in chart.x_ticks)


def test_the_description_says_what_the_curve_shows() -> None:
    chart = draw("c", "Reward", {"training": series([math.nan, 0.25, 1.5, 0.5])}, (0, 4))
    assert chart.description == "Reward: training 0.25 at step 2, 0.5 at step 4, between 0.25 and 1.5"
