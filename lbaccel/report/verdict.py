"""The sentences that a report of runs begins with: values, intervals, and differences by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lbaccel.runs.compare import lower_is_better
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.groups import (
    LEVEL,
    SEED,
    Group,
    Mean,
    are_grouped,
    differing_settings,
    ended,
    label_of,
)
from lbaccel.runs.read import Run
from lbaccel.text import one_line

LAST = 5  # evaluations of which a run's value is the median
MARGIN = 0.5  # points: a difference whose whole interval lies inside is negligible
Interval = tuple[float, float]
_SAID = {  # of the best group beside the next one; a gain and a loss are resolved
    "no loss": f"negligible: inside {MARGIN:g} points",
    "not resolved": "not resolved: the interval holds 0",
}


@dataclass(frozen=True)
class SeedDifference:
    """One group against another: of each seed that both have, its value less the other's.

    Args:
        metric: of which they are.
        by_seed: the difference of each seed.
    """

    metric: str
    by_seed: Mapping[Any, float]

    @property
    def mean(self) -> Mean:
        """Over the seeds, with Student's t-interval."""
        return Mean(tuple(self.by_seed.values()))

    @property
    def verdict(self) -> str:
        """See `verdict_on`."""
        return verdict_on(self.mean.interval, self.metric)


def verdict_on(interval: Interval | None, metric: str) -> str:
    """A difference by its interval: no loss, loss, gain, not resolved, or not enough seeds.

    Of percentages "no loss" is an interval inside plus and minus half a point, whatever its sign;
    other metrics have no such margin.

    >>> verdict_on((-0.2, 0.4), "val/top1"), verdict_on((-2.0, -0.1), "val/top1")
    ('no loss', 'loss')
    >>> verdict_on((0.1, 2.0), "val/loss"), verdict_on((-1.0, 2.0), "val/top1")
    ('loss', 'not resolved')
    """
    if interval is None:
        return "not enough seeds"
    low, high = interval
    if unit_of(metric) == " (%)" and low >= -MARGIN and high <= MARGIN:
        return "no loss"
    better, worse = ("gain", "loss")[:: -1 if lower_is_better(metric) else 1]
    if low > 0:
        return better
    return worse if high < 0 else "not resolved"


def num_last(runs: Sequence[Run], metric: str) -> int:
    """How many evaluations the value of a run is the median of: 5, or 1 where a run has few."""
    counts = [len(one.history.get(metric, ())) for one in runs if ended(one)]
    return LAST if min(counts, default=0) >= 2 * LAST else 1


def value_of(one: Run, metric: str, last: int) -> float | None:
    """The median of a run's last values; None where it did not end, or one is not finite."""
    values = [point.value for point in one.history.get(metric, ())][-last:]
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) and ended(one) else None


def values_of(group: Group, metric: str, last: int) -> dict[Any, float]:
    """The value of each seed; two runs of one seed count once, with their mean."""
    found: dict[Any, list[float]] = {}
    for one in group.runs:
        value = value_of(one, metric, last)
        if value is not None:
            found.setdefault(one.config.get(SEED), []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def difference(group: Group, against: Group, metric: str, last: int) -> SeedDifference:
    """Of the seeds that both groups have."""
    own, other = values_of(group, metric, last), values_of(against, metric, last)
    shared = [seed for seed in own if seed is not None and seed in other]
    return SeedDifference(metric, {seed: own[seed] - other[seed] for seed in shared})


def names_of(groups: Sequence[Group]) -> list[str]:
    """A name for each group, such as "group 2 (base_lr=0.1)"; of a single one "the run"."""
    if len(groups) == 1:
        return ["this group of runs" if len(groups[0].runs) > 1 else "the run"]
    word = "group" if are_grouped(groups) else "run"
    names = []
    for number, settings in enumerate(differing_settings(groups), 1):
        label = one_line(label_of(settings, number))
        short = label if len(label) <= 60 else f"{label[:57]}..."
        names.append(f"{word} {number}" + (f" ({short})" if settings else ""))
    return names


def sentences(groups: Sequence[Group], metric: str, last: int) -> list[str]:
    """The verdict on these groups; the first sentence says the most."""
    names = names_of(groups)
    found = [Mean(tuple(values_of(group, metric, last).values())) for group in groups]
    order = [i for i, of in enumerate(found) if of.mean is not None]
    if not order:
        return [f"No run has come to its end with a {metric} that is finite."]
    order.sort(key=lambda i: _rank(found[i], metric))
    best = order[0]
    first = f"{_capital(names[best])} {_reached(found[best], metric)}"
    lines = []
    if len(order) > 1:
        second = order[1]
        apart = difference(groups[best], groups[second], metric, last)
        gap = _apart(apart, found[best], found[second])
        lines.append(f"{first}, {gap} {names[second]}: {_paired(apart)}.")
        if len(order) > 2:
            kind = "groups" if are_grouped(groups) else "runs"
            lines.append(
                f"It was chosen out of {len(order)} {kind} by this very figure, so its lead is "
                "more likely too large than too small."
            )
    else:
        lines.append(f"{first}.")
    few = [names[i] for i in order if found[i].n < 2]
    if few:
        whose = "" if len(order) == len(few) else f" of {', '.join(few[:4])}"
        lines.append(f"One seed{whose} tells nothing of the spread over seeds.")
    return lines


def _rank(found: Mean, metric: str) -> float:
    value = found.mean or 0.0
    return value if lower_is_better(metric) else -value


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reached(found: Mean, metric: str) -> str:
    text = f"reaches {in_unit(found.mean, metric)} {metric}"
    if found.n == 1:
        return f"{text} (1 seed)"
    low, high = found.interval or (0.0, 0.0)
    ends = f"{number(low, metric)} to {number(high, metric)}"
    return f"{text} (mean of {found.n} seeds, {ends})"


def _apart(apart: SeedDifference, own: Mean, other: Mean) -> str:
    gap = apart.mean.mean
    if gap is None:
        gap = (own.mean or 0.0) - (other.mean or 0.0)
    unit = " points" if unit_of(apart.metric) == " (%)" else ""
    return f"{number(abs(gap), apart.metric)}{unit} {'above' if gap >= 0 else 'below'}"


def _paired(apart: SeedDifference) -> str:
    of = apart.mean
    if of.n == 0:
        return "the two share no seed, so nothing is paired and no interval is given"
    if of.interval is None:
        return "not enough seeds for an interval"
    sign = -1 if (of.mean or 0.0) < 0 else 1  # the sentence says above or below
    low, high = sorted(sign * end for end in of.interval)
    ends = f"{number(low, apart.metric)} to {number(high, apart.metric)}"
    said = _SAID.get(apart.verdict, "resolved")
    return f"{ends}, paired by {of.n} seeds ({said})"


def number(value: float | None, metric: str) -> str:
    """A value of a metric as it stands in a sentence."""
    if value is None:
        return "-"
    return f"{value:.2f}" if unit_of(metric) == " (%)" else f"{value:.4g}"


def in_unit(value: float | None, metric: str) -> str:
    """With its unit, where it has one.

    >>> in_unit(91.204, "val/top1"), in_unit(0.25, "val/loss")
    ('91.20 %', '0.25')
    """
    unit = unit_of(metric).strip(" ()")
    return f"{number(value, metric)}{f' {unit}' if unit else ''}"


def how_counted(metric: str, last: int, groups: Sequence[Group]) -> str:
    """The rule behind the figures, in words."""
    of = f"the median of its last {last} evaluations" if last > 1 else "its last evaluation"
    text = f"The value of a run is {of} of {metric}, not its best one."
    if any(len(values_of(group, metric, last)) > 1 for group in groups):
        text += (
            f" Intervals are Student's at {100 * LEVEL:g} %, over seeds. A difference is taken "
            "seed by seed: runs of one seed share the order of the data, the augmentation and the "
            "initial weights."
        )
        if unit_of(metric) == " (%)":
            text += (
                f' "No loss" is an interval inside plus and minus {MARGIN:g} points; "loss" and '
                '"gain" are intervals that lie wholly on one side of 0.'
            )
    return text
