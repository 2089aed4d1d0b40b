"""A value and a difference have the same digits wherever they stand."""

from __future__ import annotations

import math

import pytest

from lbaccel.runs.compare_figure import unit_of
from lbaccel.studies.judging import amount, number, signed


@pytest.mark.parametrize("metric", ["val/top1", "val/top5", "val/top1_ema", "val/loss"])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -math.pi, 91.2])
def test_digits_and_unit_follow_one_rule(metric, value):
    in_points = metric != "val/loss"
    assert unit_of(metric) == (" (%)" if in_points else "")
    digits = ".2f" if in_points else ".4g"
    assert number(value, metric) == format(value, digits)
    assert signed(value, metric) == format(value, f"+{digits}")
    unit = " points" if in_points else ""
    side = "lower" if value < 0 else "higher"
    assert amount(value, metric) == f"{number(abs(value), metric)}{unit} {side}"


def test_a_missing_value_is_a_dash():
    assert number(None, "val/loss") == signed(None, "val/top1") == "-"
