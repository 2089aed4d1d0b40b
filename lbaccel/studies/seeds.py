"""How many seeds tell a difference from 0, before they are run (no torch)."""

from __future__ import annotations

import math

from lbaccel.errors import check_number, check_whole
from lbaccel.runs.groups import LEVEL

MARGIN = 0.5  # points: a smaller difference is no loss
MOST_SEEDS = 10_000  # that a plan speaks of


def quantile(n: int) -> float:
    """Student's t of the 95 % interval of n values: its (1 + 0.95) / 2 quantile at n - 1 degrees.

    >>> round(quantile(3), 4)
    4.3027
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + LEVEL) / 2))


def resolves(num_seeds: int, spread: float, *, correlation: float = 0.0) -> float:
    """The difference that so many seeds can tell from 0: the expected half-width of the interval.

    With n seeds, sigma the standard deviation over seeds of one run's result, rho the correlation
    of the two runs of a seed, and t the 0.975 quantile of Student's distribution with n - 1 degrees
    of freedom, the difference of a pair has the standard deviation sigma sqrt(2 (1 - rho)), so

        half-width = t sigma sqrt(2 (1 - rho)) / sqrt(n)

    It is the half-width where the measured variance is the expected one; a study may come out
    narrower or wider. Infinite for one seed, which has no interval.

    Args:
        num_seeds: n.
        spread: sigma, in points.
        correlation: rho, below 1; 0 takes no advantage of pairing.

    Raises:
        InputError: a number out of its bounds.

    >>> [round(resolves(n, 0.4), 2) for n in (2, 3, 5, 10)]
    [5.08, 1.41, 0.7, 0.4]
    """
    check_whole("num_seeds", num_seeds)
    check_number("spread", spread, zero=True)
    check_number("1 - correlation", 1 - correlation, at_most=2.0)
    if num_seeds == 1:
        return math.inf
    return quantile(num_seeds) * spread * math.sqrt(2 * (1 - correlation) / num_seeds)


def seeds_to_resolve(points: float, spread: float, *, correlation: float = 0.0) -> int | None:
    """The fewest seeds whose `resolves` is at most `points`; None above 10,000.

    Raises:
        InputError: a number out of its bounds.

    >>> seeds_to_resolve(0.5, 0.4), seeds_to_resolve(0.001, 0.4)
    (8, None)
    """
    check_number("points", points)
    low, high = 1, MOST_SEEDS  # `resolves` falls with the number of seeds
    if resolves(high, spread, correlation=correlation) > points:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if resolves(middle, spread, correlation=correlation) <= points:
            high = middle
        else:
            low = middle
    return high


def resolution(num_seeds: int, spread: float, *, correlation: float = 0.0) -> str:
    """A sentence on what the seeds of a study can resolve, and how many resolve 0.5 points.

    >>> print(resolution(3, 0.4))
    With a standard deviation of 0.4 points a run, 3 seeds resolve 1.4 points, 5 seeds 0.7. To
    resolve 0.5 points, run 8 seeds.
    """
    start = f"With a standard deviation of {spread:g} points a run, "
    more = next(n for n in (2, 3, 5, 10, 20, num_seeds + 20) if n > num_seeds)
    numbers = {n: resolves(n, spread, correlation=correlation) for n in (num_seeds, more)}
    if num_seeds == 1:
        said = f"1 seed resolves nothing, {more} seeds resolve {numbers[more]:.1f} points."
    else:
        said = (
            f"{num_seeds} seeds resolve {numbers[num_seeds]:.1f} points, "
            f"{more} seeds {numbers[more]:.1f}."
        )
    needed = seeds_to_resolve(MARGIN, spread, correlation=correlation)
    if needed is None:
        return (
            f"{start}{said} More than {MOST_SEEDS:,} seeds would be needed for {MARGIN:g} points."
        )
    if needed <= num_seeds:
        return f"{start}{said}"
    return f"{start}{said} To resolve {MARGIN:g} points, run {needed} seeds."
