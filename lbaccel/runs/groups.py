"""Runs that differ only in their seed, as one group: the mean and its interval (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lbaccel.runs.compare import Cell, as_cell, best_point, columns_of, formatted, split_settings
from lbaccel.runs.read import Run

SEED = "seed"
LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of independent values, with Student's t-interval.

    The interval is `mean +- t s / sqrt(n)`, with `s` the standard deviation of the `n` values
    (divisor n - 1) and `t` the quantile `(1 + LEVEL) / 2` of Student's distribution with n - 1
    degrees of freedom. It supposes values that are normally distributed, and is not cut at the ends
    of a scale: around a top-1 of 99.5 % it may reach past 100 %.

    >>> round(Mean((1.0, 2.0, 3.0)).half_width, 3)  # 4.3027 x 1 / sqrt(3)
    2.484
    """

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """None of no values."""
        return fmean(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Of the interval; None below two values."""
        if self.n < 2:
            return None
        from scipy.special import stdtrit

        mean = fmean(self.values)  # NaN where a value is: of a run that diverged
        variance = math.fsum((value - mean) ** 2 for value in self.values) / (self.n - 1)
        return float(stdtrit(self.n - 1, (1 + LEVEL) / 2)) * math.sqrt(variance / self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends; None below two values."""
        mean, half = self.mean, self.half_width
        return None if mean is None or half is None else (mean - half, mean + half)


@dataclass(frozen=True)
class Group:
    """Runs of one experiment: they differ in nothing but the seed, and in how they were started.

    Attributes:
        settings: of the experiment, without the seed.
        runs: in the order given; a run that names no seed is a group of its own.
    """

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    def bests(self, metric: str) -> dict[Any, float]:
        """The best value of each seed whose run came to its end.

        Two runs of one seed are no two draws: their mean counts once.
        """
        found: dict[Any, list[float]] = {}
        for one in self.runs:
            best = best_point(one.history.get(metric, ()), metric)
            if best is not None and best.value is not None and ended(one):
                found.setdefault(one.config.get(SEED), []).append(best.value)
        return {seed: fmean(values) for seed, values in found.items()}

    def mean(self, metric: str) -> Mean:
        """Over the seeds, of the best values."""
        return Mean(tuple(self.bests(metric).values()))


def ended(one: Run) -> bool:
    """Whether a run came to its end; one that says nothing of it, as of a loop of your own, did."""
    return one.summary.get("status") in (None, "done")


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order of their first ones.

    >>> runs = [Run(str(i), {"seed": i, "lr": 0.1}, {}, {}, "folder") for i in range(3)]
    >>> [len(group.runs) for group in groups_of(runs)]
    [3]
    """
    groups: list[tuple[Mapping[str, Any] | None, list[Run]]] = []
    for one in runs:
        rest = {key: value for key, value in one.config.items() if key != SEED}
        known = rest if SEED in one.config else None
        alike = next((of for settings, of in groups if settings == known is not None), None)
        if alike is None:
            groups.append((known, [one]))
        else:
            alike.append(one)
    return [
        Group({k: v for k, v in of[0].config.items() if k != SEED}, tuple(of)) for _, of in groups
    ]


def are_grouped(groups: Sequence[Group]) -> bool:
    """Whether any group has several runs, so that groups have something to say."""
    return any(len(group.runs) > 1 for group in groups)


def differing_settings(groups: Sequence[Group]) -> list[dict[str, Cell]]:
    """Of each group the settings in which groups differ."""
    _, names = split_settings([group.settings for group in groups])
    return [{name: as_cell(group.settings.get(name)) for name in names} for group in groups]


def label_of(settings: Mapping[str, Cell], number: int) -> str:
    """A group by its settings, or by its number where there is nothing to tell it apart by."""
    named = ", ".join(f"{key}={formatted(key, value)}" for key, value in settings.items())
    return named or f"group {number}"


def group_rows(groups: Sequence[Group], metric: str) -> list[dict[str, Cell]]:
    """One row a group, with all that is told of it; None is missing.

    Columns: group (a number from 1), the settings in which groups differ, seeds, mean, half_width,
    `each` (the best of each seed, as text), and delta: the mean minus that of the first group.
    """
    rows: list[dict[str, Cell]] = []
    first = groups[0].mean(metric).mean
    for number, (group, settings) in enumerate(
        zip(groups, differing_settings(groups), strict=True), 1
    ):
        found = group.mean(metric)
        row: dict[str, Cell] = {"group": number, **columns_of(settings)}
        row |= {"seeds": found.n, "mean": found.mean, "half_width": found.half_width}
        each = (f"{seed}: {value:.5g}" for seed, value in group.bests(metric).items())
        row["each"] = ", ".join(each) or None
        row["delta"] = None
        if number > 1 and found.mean is not None and first is not None:
            row["delta"] = found.mean - first
        rows.append(row)
    return rows


def numbers_of(runs: Sequence[Run], groups: Sequence[Group]) -> list[int]:
    """The number of each run's group, from 1."""
    number = {id(one): n for n, group in enumerate(groups, 1) for one in group.runs}
    return [number[id(one)] for one in runs]


def with_groups(
    runs: Sequence[Run], rows: Sequence[Mapping[str, Cell]], groups: Sequence[Group], metric: str
) -> list[dict[str, Cell]]:
    """The rows of these runs, each with the number and the figures of its group."""
    found = [group.mean(metric) for group in groups]
    wider: list[dict[str, Cell]] = []
    for number, row in zip(numbers_of(runs, groups), rows, strict=True):
        of = found[number - 1]
        low, high = of.interval or (None, None)
        figures = {"seeds": of.n, "mean": of.mean, "low": low, "high": high}
        wider.append({**row, "group": number, **{f"group_{k}": v for k, v in figures.items()}})
    return wider


def left_out(groups: Sequence[Group], metric: str) -> list[str]:
    """Sentences on the runs that no mean counts, and on seeds that are there twice."""
    notes = []
    for number, group in enumerate(groups, 1):
        if len(group.runs) == 1:
            continue
        for one in group.runs:
            status = one.summary.get("status")
            if not ended(one):
                notes.append(f"{one.name} is {status}: the mean of its group leaves it out")
            elif best_point(one.history.get(metric, ()), metric) is None:
                notes.append(f"{one.name} has no {metric}: the mean of its group leaves it out")
        seeds = [one.config[SEED] for one in group.runs if ended(one)]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1}, key=str)
        for seed in twice:
            notes.append(
                f"group {number} has seed {seed} {seeds.count(seed)} times: runs of one seed are "
                "no independent draws, so their mean counts once"
            )
    return notes


def as_json(groups: Sequence[Group], metric: str) -> list[dict[str, Any]]:
    """Each group as a mapping: settings, runs, the best of each seed, mean, interval."""
    found: list[dict[str, Any]] = []
    for number, (group, settings) in enumerate(
        zip(groups, differing_settings(groups), strict=True), 1
    ):
        mean, bests = group.mean(metric), group.bests(metric)
        low, high = mean.interval or (None, None)
        found.append(
            {
                "group": number,
                "settings": settings,
                "runs": [one.name for one in group.runs],
                "best_by_seed": {str(seed): value for seed, value in bests.items()},
                "seeds": mean.n,
                "mean": mean.mean,
                "level": LEVEL,
                "low": low,
                "high": high,
            }
        )
    return found


def comparison(
    runs: Sequence[Run], rows: Sequence[Mapping[str, Cell]], groups: Sequence[Group], metric: str
) -> dict[str, Any]:
    """All that `lbaccel compare --json` prints, and that a report holds; rows: of `with_groups`."""
    equal, _ = split_settings([one.config for one in runs])
    return {"metric": metric, "settings": equal, "runs": rows, "groups": as_json(groups, metric)}
