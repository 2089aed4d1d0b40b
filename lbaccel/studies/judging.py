"""The rules by which a study is judged: paired intervals over seeds, and verdicts (no torch).

Two intervals are never mixed. Those of this module are over seeds: they say how much another seed
would change. Those of `lbaccel.product.shares` are over test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lbaccel.runs.compare import is_in_points, lower_is_better
from lbaccel.runs.groups import LEVEL, Mean
from lbaccel.studies.seeds import MARGIN, quantile, seeds_to_resolve

Verdict = Literal["no loss", "loss", "gain", "not resolved", "not enough seeds"]
ROUNDING = 1e-9  # points that the subtraction of two shares may be off


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
