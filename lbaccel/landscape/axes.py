"""The grid of a loss landscape: one axis or two, each with a number of equal steps (no torch)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lbaccel.errors import InputError, brief
from lbaccel.recipe.bounds import Unfit

MOST_STEPS = 10_001  # of one axis
MOST_POINTS = 250_000  # of a grid
FARTHEST = 1e6
RULE = (
    "LOW:HIGH:POINTS, such as -1:1:51, with LOW < HIGH within 1,000,000 of 0 and POINTS a whole "
    f"number from 2 to {MOST_STEPS:,}"
)


@dataclass(frozen=True)
class Axis:
    """Points at equal distances: x_i = low + (high - low) i / (num - 1), i = 0 .. num - 1.

    >>> Axis(-1.0, 1.0, 5).values
    (-1.0, -0.5, 0.0, 0.5, 1.0)
    """

    low: float
    high: float
    num: int

    @property
    def values(self) -> tuple[float, ...]:
        """All points; 0 and 1 are exact where the axis has them."""
        span, last = self.high - self.low, self.num - 1
        return tuple(round(self.low + span * i / last, 12) for i in range(self.num))

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}:{self.num}"


def axis_of(text: str) -> Axis:
    """The axis that text such as "-1:1:51" names.

    Raises:
        Unfit: it is no such text, or its numbers are out of their bounds.

    >>> axis_of("-1:1:51")
    Axis(low=-1.0, high=1.0, num=51)
    >>> axis_of("1:-1:51")
    Traceback (most recent call last):
    lbaccel.recipe.bounds.Unfit: '1:-1:51' is not LOW:HIGH:POINTS, such as -1:1:51, with LOW < HIGH
    within 1,000,000 of 0 and POINTS a whole number from 2 to 10,001
    """
    parts = str(text).split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
        num = int(parts[2]) if re.fullmatch(r"\d{1,6}", parts[2].strip()) else 0
        good = len(parts) == 3 and -FARTHEST <= low < high <= FARTHEST
    except (ValueError, IndexError):
        low = high = math.nan
        good, num = False, 0
    if not good or not 2 <= num <= MOST_STEPS:
        raise Unfit(f"{brief(text)} is not {RULE}")
    return Axis(low, high, num)


def check_grid(x: Axis, y: Axis | None) -> int:
    """The number of points of the grid.

    Raises:
        InputError: there are more than 250,000.
    """
    num = x.num * (1 if y is None else y.num)
    if num > MOST_POINTS:
        raise InputError(
            f"--x {x} with --y {y} is a grid of {num:,} points, and at most {MOST_POINTS:,} are "
            "computed. Use fewer points an axis, such as 51."
        )
    return num
