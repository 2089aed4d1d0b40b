"""The rules by which a study is judged: paired intervals over seeds, and verdicts (no torch).

Two intervals are never mixed. Those of this module are over seeds: they say how much another seed
would change. Those of `lbaccel.product.shares` are over test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lbaccel.errors import check_number, check_whole
from lbaccel.runs.compare import is_in_points, lower_is_better
from lbaccel.runs.groups import LEVEL, Mean

Verdict = Literal["no loss", "loss", "gain", "not resolved", "not enough seeds"]
MARGIN = 0.5  # points: a smaller difference is no loss
ROUNDING = 1e-9  # points that the subtraction of two shares may be off
MOST_SEEDS = 10_000  # that a plan speaks of


@dataclass(frozen=True)
class Outcomes:
    """The results of an arm at a batch size.

    Attributes:
        values: the result of each seed whose run came to its end.
        diverged: the seeds whose runs diverged: they have no result, and they count.
    """

    values: Mapping[int, float]
    diverged: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Judgement:
    """Two places compared seed by seed.

    Attributes:
        per_seed: result minus the other's, of each seed that has both.
        difference: their mean; None where there are none.
        low, high: Student's interval of that mean; None below two seeds.
        verdict: see `judge`.
        sentence: the verdict in words.
    """

    per_seed: Mapping[int, float]
    difference: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    sentence: str


def paired(one: Outcomes, other: Outcomes) -> dict[int, float]:
    """The difference of each seed that both have, `one` minus `other`, in order of seeds.

    A seed fixes initialisation, order and augmentation, so the two runs of a seed share them. Runs
    are paired by their seeds, never by their order.

    >>> paired(Outcomes({0: 90.0, 1: 91.0}), Outcomes({1: 90.5, 2: 80.0}))
    {1: 0.5}
    """
    return {
        seed: one.values[seed] - other.values[seed]
        for seed in sorted(one.values)
        if seed in other.values
    }


def judge(
    one: Outcomes,
    other: Outcomes,
    *,
    names: tuple[str, str],
    metric: str = "val/top1",
    margin: float = MARGIN,
) -> Judgement:
    """Judge `one` against `other` by Student's interval of the paired differences.

    With d_i the difference of seed i, n seeds, s the standard deviation of the d_i (divisor n - 1)
    and t the 0.975 quantile of Student's distribution with n - 1 degrees of freedom, the interval
    is mean(d) +- t s / sqrt(n). The verdict is

    - "no loss" where the interval lies inside +-`margin`;
    - else "loss" or "gain" where it lies wholly on one side of 0;
    - else "not resolved";
    - "not enough seeds" below two pairs.

    A place with a diverged seed is never "no loss" and never "gain", and no other place has a
    "loss" against it; a place of which every run diverged has lost. A metric that is not in % has
    no margin, so it is never "no loss".

    Args:
        one, other: results by seed.
        names: of both, for the sentence.
        metric: decides the unit, and which side of 0 is the worse one.
        margin: points.

    >>> seeds = Outcomes({0: 90.0, 1: 90.2, 2: 89.9}), Outcomes({0: 90.1, 1: 90.2, 2: 90.0})
    >>> found = judge(*seeds, names=("A", "B"))
    >>> found.verdict, round(found.low, 3), round(found.high, 3)
    ('no loss', -0.21, 0.077)
    """
    differences = paired(one, other)
    mean = Mean(tuple(differences.values()))
    low, high = mean.interval or (None, None)
    sign = -1 if lower_is_better(metric) else 1
    verdict = _of_interval(low, high, sign=sign, margin=margin if is_in_points(metric) else None)
    verdict = _with_diverged(verdict, one, other)
    sentence = _sentence(verdict, mean, one, other, names=names, metric=metric, margin=margin)
    return Judgement(differences, mean.mean, low, high, verdict, sentence)


def _of_interval(
    low: float | None, high: float | None, *, sign: int, margin: float | None
) -> Verdict:
    if low is None or high is None:
        return "not enough seeds"
    if margin is not None and max(-low, high) <= margin + ROUNDING:
        return "no loss"
    if high * sign < 0 and low * sign < 0:
        return "loss"
    return "gain" if high * sign > 0 and low * sign > 0 else "not resolved"


def _with_diverged(verdict: Verdict, one: Outcomes, other: Outcomes) -> Verdict:
    if len(one.diverged) > 1 and not one.values and len(other.values) > 1:
        return "loss"
    if len(other.diverged) > 1 and not other.values and len(one.values) > 1:
        return "gain"
    lost = verdict in ("no loss", "gain") and bool(one.diverged)
    won = verdict in ("no loss", "loss") and bool(other.diverged)
    return "not resolved" if lost or won else verdict


def _sentence(
    verdict: Verdict,
    mean: Mean,
    one: Outcomes,
    other: Outcomes,
    *,
    names: tuple[str, str],
    metric: str,
    margin: float,
) -> str:
    diverged = " ".join(
        diverged_text(of, name) for of, name in zip((one, other), names, strict=True)
    )
    begin = f"{verdict.capitalize()}: "
    if mean.mean is None:
        why = "" if one.diverged or other.diverged else "no seed has a result of both."
        return begin + " ".join(f"{names[0]} against {names[1]}: {why} {diverged}".split())
    text = f"{begin}{names[0]} is {amount(mean.mean, metric)} than {names[1]}"
    if mean.interval is None:
        one_seed = ". One seed gives no interval; run at least 3 seeds."
        return " ".join(f"{text}{one_seed} {diverged}".split())
    low, high = mean.interval
    inside = is_in_points(metric) and max(-low, high) <= margin + ROUNDING
    text += f" (mean of {mean.n} paired seeds, {100 * LEVEL:g} % interval {signed(low, metric)} to "
    text += f"{signed(high, metric)})."
    if inside:
        text += f" The interval lies inside ±{margin:g} points."
        if low > 0 or high < 0:
            text += " The difference is resolved, and it is too small to count."
    elif low <= 0 <= high:
        text += " The interval contains 0."
        if is_in_points(metric):
            text += _more_seeds(mean, margin)
    else:
        text += f" The interval lies wholly {'above' if low > 0 else 'below'} 0."
    return f"{text} {diverged}".strip()


def diverged_text(of: Outcomes, name: str) -> str:
    """How many runs of a place diverged, a sentence; "" where none did.

    >>> diverged_text(Outcomes({0: 90.0}, frozenset({1})), "A")
    '1 of 2 runs of A diverged, and diverged runs count.'
    """
    count, total = len(of.diverged), len(of.diverged) + len(of.values)
    if not count:
        return ""
    return f"{count} of {total} runs of {name} diverged, and diverged runs count."


def _more_seeds(mean: Mean, points: float) -> str:
    """How many seeds would do, if the differences go on to spread as those that are there."""
    half = mean.half_width
    assert half is not None
    spread = half * math.sqrt(mean.n) / quantile(mean.n) / math.sqrt(2)  # of one run, uncorrelated
    needed = seeds_to_resolve(points, spread)
    if needed is None or needed <= mean.n:
        return ""
    return f" With this spread, about {needed} seeds resolve {points:g} points."


def amount(difference: float, metric: str) -> str:
    """A difference in words.

    >>> amount(-1.584, "val/top1"), amount(0.02, "val/loss")
    ('1.58 points lower', '0.02 higher')
    """
    side = "lower" if difference < 0 else "higher"
    return f"{number(abs(difference), metric)}{' points' * is_in_points(metric)} {side}"


def number(value: float | None, metric: str) -> str:
    """A value of a metric in a sentence or a table; `-` where there is none.

    >>> number(91.204, "val/top1"), number(0.25, "val/loss"), number(None, "val/top1")
    ('91.20', '0.25', '-')
    """
    return _written(value, metric)


def signed(value: float | None, metric: str) -> str:
    """A difference of a metric, or a bound of one, in the same digits.

    >>> signed(-0.5, "val/top1"), signed(0.02, "val/loss")
    ('-0.50', '+0.02')
    """
    return _written(value, metric, sign="+")


def _written(value: float | None, metric: str, *, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.2f}" if is_in_points(metric) else f"{value:{sign}.4g}"


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
