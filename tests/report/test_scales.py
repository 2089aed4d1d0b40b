"""Axes of a chart: places between the ends, round ticks inside, and no axis without width."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbaccel.report.scales import Scale, linear_ticks, log_ticks, scale_of, short

NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=1))
def test_every_value_of_a_linear_axis_stands_on_it(values):
    scale = scale_of(values, "linear")
    assert all(0 <= scale.place(value) <= 1 for value in values)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
@pytest.mark.parametrize("kind", ["log", "log2"])
def test_every_value_of_a_log_axis_stands_on_it(kind, values):
    scale = scale_of(values, kind)
    assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in values)
    assert all(scale.low <= tick <= scale.high for tick, _ in scale.ticks())


def test_no_tick_lies_beyond_an_axis_by_rounding():
    assert linear_ticks(0.15, 0.6, 4)[-1] == 0.6  # and not 3 x 0.2


@given(NUMBERS, st.floats(1e-3, 1e6))
def test_linear_ticks_lie_inside_and_are_few(low, width):
    ticks = linear_ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)


def test_a_range_of_one_value_has_a_width():
    assert scale_of([5.0, 5.0], "linear").low < 5 < scale_of([5.0, 5.0], "linear").high
    assert scale_of([5.0], "log").low < 5 < scale_of([5.0], "log").high
    assert scale_of([0.0], "linear").ticks()


def test_a_share_in_percent_does_not_reach_far_past_100():
    assert scale_of([40.0, 100.0], "linear", most=100.0).high < 101
    assert scale_of([40.0, 130.0], "linear", most=100.0).high > 130


def test_what_has_no_logarithm_has_no_place():
    assert math.isnan(Scale("log", 1, 10).place(0.0))
    assert scale_of([-1.0, 0.0, 2.0, 8.0], "log").low > 0


def test_a_log2_axis_names_batch_sizes():
    assert [text for _, text in Scale("log2", 100, 5000).ticks()] == [
        *("128", "256", "512", "1,024", "2,048", "4,096")
    ]


def test_a_long_log_axis_has_powers_of_ten_alone():
    assert log_ticks(1e-3, 1e4) == pytest.approx([10.0**k for k in range(-3, 5)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12345.6, "12.346k"), (-2500, "-2500"), (1.5e-4, "1.5e-4"), (3e8, "300M")],
)
def test_a_tick_is_short(value, text):
    assert short(value) == text
