"""Numbers of the command line and of a recipe, each with the bounds in which it is of use.

One object stands for one rule: it reads a flag of any command (`type=` of argparse), and it is the
`parse` of an option of the recipe.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lbaccel.batch.duration import MOST_EPOCHS
from lbaccel.errors import brief
from lbaccel.recipe.values import numbers, whole

MOST = 2**53  # beyond it a float can't tell a number of samples from the next one
MOST_PIXELS = 65_535  # a side: the largest image that JPEG has
MOST_RANKS = 2**20
MOST_CLASSES = 10**7  # the largest sets of faces have half of it
MOST_WORKERS = 1024  # processes of one rank
MOST_MINUTES = 525_600  # a year


class Unfit(ValueError, argparse.ArgumentTypeError):
    """A value outside its rule; argparse and `settings.parse` put the flag before the text."""


@dataclass(frozen=True)
class Bounded:
    """A number within bounds, read from text or YAML; infinity and nan are in none.

    Attributes:
        rule: the bounds in words, which follow "is not".
        read: text to a number, `float` or `whole`.
        low: the smallest number.
        high: the largest number.
        without_low: `low` itself is outside.
        without_high: `high` itself is outside.
        words: those that may stand in place of a number, such as "frozen".

    >>> below_one("0.9"), norm_samples("frozen")
    (0.9, 'frozen')
    >>> count("-1")
    Traceback (most recent call last):
    lbaccel.recipe.bounds.Unfit: '-1' is not a whole number from 1 to 2^53
    """

    rule: str
    read: Callable[[Any], Any] = float
    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    words: tuple[str, ...] = ()

    def __call__(self, raw: Any) -> Any:
        """The number, or the word.

        Raises:
            Unfit: no number, or one outside the bounds.
        """
        if isinstance(raw, str) and raw in self.words:
            return raw
        try:
            value = self.read(raw)
            good = not isinstance(raw, bool) and math.isfinite(value) and self.holds(value)
        except (ValueError, TypeError, OverflowError):
            good, value = False, None
        if not good:
            raise Unfit(f"{brief(raw)} is not {self.rule}")
        return value

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below


@dataclass(frozen=True)
class BoundedList:
    """Numbers of the recipe, each within the same bounds: text such as '30 60', a list, or one."""

    each: Bounded

    @property
    def rule(self) -> str:
        """The bounds in words, which follow "is not"."""
        return f"numbers, each {self.each.rule}"

    def __call__(self, raw: Any) -> tuple[Any, ...]:
        """The numbers.

        Raises:
            Unfit: one that is none, or outside the bounds.
        """
        try:
            return tuple(self.each(number) for number in numbers(raw))
        except (ValueError, TypeError, OverflowError):
            raise Unfit(f"{brief(raw)} is not {self.rule}") from None


def whole_from(low: int) -> Bounded:
    """A whole number of at least `low`."""
    return Bounded(f"a whole number from {low} to 2^53", whole, low, MOST)


temperature = Bounded(  # above, T^2 times the rounding of the divergence is the loss in float32
    "a number above 0 and at most 100", float, 0, 100, without_low=True
)
count = whole_from(1)
count_from_zero = whole_from(0)
norm_samples = Bounded(
    "a whole number from 1 to 2^53, 'global' or 'frozen'",
    whole,
    1,
    MOST,
    words=("global", "frozen"),
)
samples_or_auto = Bounded(
    "a whole number from 1 to 2^53, or 'auto'", whole, 1, MOST, words=("auto",)
)
pixels = Bounded(f"a whole number from 1 to {MOST_PIXELS:,}", whole, 1, MOST_PIXELS)
classes = Bounded(f"a whole number from 1 to {MOST_CLASSES:,}", whole, 1, MOST_CLASSES)
workers = Bounded(f"a whole number from 0 to {MOST_WORKERS:,}", whole, 0, MOST_WORKERS)
ranks = Bounded(f"a whole number from 1 to {MOST_RANKS:,}", whole, 1, MOST_RANKS)
seed = Bounded("a whole number from 0 to 2^64 - 1", whole, 0, 2**64 - 1)
recipe_seed = Bounded("a whole number from 0 to 2^31 - 1", whole, 0, 2**31 - 1)
minutes = Bounded(
    f"a number above 0 and at most {MOST_MINUTES:,}", low=0, high=MOST_MINUTES, without_low=True
)
zero_stage = Bounded("0, 1, 2 or 3", whole, 0, 3)
finite = Bounded("a finite number")
positive = Bounded("a finite number above 0", low=0, without_low=True)
not_negative = Bounded("a finite number of at least 0", low=0)
below_one = Bounded("a number of at least 0 and below 1", low=0, high=1, without_high=True)
probability = Bounded("a number from 0 to 1", low=0, high=1)
of_images = Bounded("a share from 0 to 1, such as 0.9 for 90 %", low=0, high=1)
share = Bounded("a number above 0 and at most 1", low=0, high=1, without_low=True)
epochs = Bounded(
    f"a number above 0 and at most {MOST_EPOCHS:,.0f}", low=0, high=MOST_EPOCHS, without_low=True
)
start_rate = Bounded(
    "'reference', 'zero' or a learning rate of at least 0", low=0, words=("reference", "zero")
)
share_held_out = Bounded(
    "a number above 0 and below 1", low=0, high=1, without_low=True, without_high=True
)
many_epochs, many_positive = BoundedList(epochs), BoundedList(positive)
many_below_one = BoundedList(below_one)
# whole ones are told from others by the schedule that reads them: a saved 64.0 is 64
many_sizes = BoundedList(Bounded("a whole number from 1 to 2^53", low=1, high=MOST))
epochs_from_zero = Bounded(f"a number from 0 to {MOST_EPOCHS:,.0f}", low=0, high=MOST_EPOCHS)
many_from_zero = BoundedList(epochs_from_zero)  # the setting itself says why none is 0
