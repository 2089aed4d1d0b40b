"""The sentences that a report of runs begins with: values, intervals, and differences by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lbaccel.runs.compare import is_in_points, lower_is_better
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.groups import (
    SEED,
    Group,
    Mean,
    are_grouped,
    differing_settings,
    ended,
    label_of,
)
from lbaccel.runs.read import Run
from lbaccel.studies.judging import MARGIN, Judgement, Outcomes, judge, number
from lbaccel.studies.judging import signed as differing
from lbaccel.studies.outcome import final_value
from lbaccel.studies.rules import seeds_rule, value_rule
from lbaccel.text import one_line

LAST = 5  # evaluations of which a run's value is the median
_SAID = {  # of the best group beside the next one; a gain and a loss are resolved
    "no loss": f"negligible: inside {MARGIN:g} points",
    "not resolved": "not resolved: the interval holds 0",
}


def num_last(runs: Sequence[Run], metric: str) -> int:
    """How many evaluations the value of a run is the median of: 5, or 1 where a run has few."""
    counts = [len(one.history.get(metric, ())) for one in runs if ended(one)]
    return LAST if min(counts, default=0) >= 2 * LAST else 1


def value_of(one: Run, metric: str, last: int) -> float | None:
    """The median of a run's last values; None where it did not end, or one is not finite."""
    return final_value(one.history.get(metric, ()), last) if ended(one) else None


def outcomes_of(group: Group, metric: str, last: int) -> Outcomes:
    """The value of each seed, and the seeds that diverged; two runs of one seed count once."""
    found: dict[Any, list[float]] = {}
    diverged = set()
    for one in group.runs:
        seed, value = one.config.get(SEED), value_of(one, metric, last)
        if value is not None:
            found.setdefault(seed, []).append(value)
        elif one.summary.get("diverged") is True or (ended(one) and one.history.get(metric)):
            diverged.add(seed)
    values = {seed: fmean(values) for seed, values in found.items()}
    return Outcomes(values, frozenset(diverged - set(values)))


def judged(group: Group, against: Group, metric: str, last: int) -> Judgement:
    """One group against another by the rules of studies: paired by seed, Student's interval."""
    pair = []
    for of in (group, against):
        found = outcomes_of(of, metric, last)
        known = {seed: value for seed, value in found.values.items() if seed is not None}
        pair.append(Outcomes(known, found.diverged))
    return judge(pair[0], pair[1], names=("it", "the other"), metric=metric)


def names_of(groups: Sequence[Group]) -> list[str]:
    """A name for each group, such as "group 2 (base_lr=0.1)"; of a single one "the run"."""
    if len(groups) == 1:
        return ["this group of runs" if len(groups[0].runs) > 1 else "the run"]
    word = "group" if are_grouped(groups) else "run"
    names = []
    for place, settings in enumerate(differing_settings(groups), 1):
        label = one_line(label_of(settings, place))
        short = label if len(label) <= 60 else f"{label[:57]}..."
        names.append(f"{word} {place}" + (f" ({short})" if settings else ""))
    return names


def sentences(groups: Sequence[Group], metric: str, last: int) -> list[str]:
    """The verdict on these groups; the first sentence says the most."""
    names = names_of(groups)
    found = [Mean(tuple(outcomes_of(group, metric, last).values.values())) for group in groups]
    order = [i for i, of in enumerate(found) if of.mean is not None]
    if not order:
        return [
            f"No run has come to its end with a {metric} that is finite.",
            *_so_far(groups, metric),
        ]
    order.sort(key=lambda i: _rank(found[i], metric))
    best = order[0]
    first = f"{_capital(names[best])} {_reached(found[best], metric)}"
    lines = []
    if len(order) > 1:
        second = order[1]
        apart = judged(groups[best], groups[second], metric, last)
        gap = _apart(apart, found[best], found[second], metric)
        lines.append(f"{first}, {gap} {names[second]}: {_paired(apart, metric)}.")
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


def _so_far(groups: Sequence[Group], metric: str) -> list[str]:
    """Of a single run that did not end, its newest evaluation."""
    runs = [one for group in groups for one in group.runs]
    points = runs[0].history.get(metric, ())
    if len(runs) != 1 or not points or points[-1].value is None:
        return []
    last = points[-1]
    return [f"So far its {metric} is {in_unit(last.value, metric)} (update {last.update:,})."]


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


def _apart(apart: Judgement, own: Mean, other: Mean, metric: str) -> str:
    gap = apart.difference
    if gap is None:
        gap = (own.mean or 0.0) - (other.mean or 0.0)
    unit = " points" if is_in_points(metric) else ""
    return f"{number(abs(gap), metric)}{unit} {'above' if gap >= 0 else 'below'}"


def _paired(apart: Judgement, metric: str) -> str:
    if not apart.per_seed:
        return "the two share no seed, so nothing is paired and no interval is given"
    if apart.low is None or apart.high is None:
        return "not enough seeds for an interval"
    sign = -1 if (apart.difference or 0.0) < 0 else 1  # the sentence says above or below
    low, high = sorted((sign * apart.low, sign * apart.high))
    ends = f"{number(low, metric)} to {number(high, metric)}"
    said = _SAID.get(apart.verdict, "resolved")
    return f"{ends}, paired by {len(apart.per_seed)} seeds ({said})"


def ends(low: float | None, high: float | None, *, metric: str, signed: bool = False) -> str:
    """An interval as it stands in a table; `-` where there is none.

    >>> ends(-0.5, 0.25, metric="val/top1", signed=True), ends(None, None, metric="val/loss")
    ('-0.50 to +0.25', '-')
    """
    if low is None or high is None:
        return "-"
    write = differing if signed else number
    return f"{write(low, metric)} to {write(high, metric)}"


def in_unit(value: float | None, metric: str) -> str:
    """With its unit, where it has one.

    >>> in_unit(91.204, "val/top1"), in_unit(0.25, "val/loss")
    ('91.20 %', '0.25')
    """
    unit = unit_of(metric).strip(" ()")
    return f"{number(value, metric)}{f' {unit}' if unit else ''}"


def how_counted(metric: str, last: int, groups: Sequence[Group]) -> str:
    """The rule behind the figures, in words."""
    if any(len(outcomes_of(group, metric, last).values) > 1 for group in groups):
        return f"{value_rule(metric, last)} {seeds_rule(metric)}"
    return value_rule(metric, last)
