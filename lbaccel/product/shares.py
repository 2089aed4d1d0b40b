"""Shares of images that are right: Wilson's interval of one, McNemar's test of two (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def wilson(num_right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable inference", JASA 22).

    >>> tuple(round(bound, 3) for bound in wilson(9, 10))
    (0.596, 0.982)
    """
    from scipy.stats import binomtest

    interval = binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class McNemar:
    """Two classifiers on the same images (McNemar 1947, exact: binomial in the discordant pairs).

    Args:
        only_first: images that the first alone has right.
        only_second: images that the second alone has right.
        p: two-sided probability of a split at least so uneven, if both were equally good.
    """

    only_first: int
    only_second: int
    p: float

    def __str__(self) -> str:
        if self.only_first == self.only_second == 0:
            return "A and B are right on the same images"
        return (
            f"B is right on {self.only_second} that A misses, wrong on {self.only_first} that A "
            f"has: p = {self.p:.2g}"
        )


def mcnemar(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of two classifiers.

    Args:
        first_right: [n], whether the first is right.
        second_right: [n], the same of the second, on the same images.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differing = only_first + only_second
    from scipy.stats import binomtest

    p = float(binomtest(only_second, differing).pvalue) if differing else 1.0
    return McNemar(only_first, only_second, p)
