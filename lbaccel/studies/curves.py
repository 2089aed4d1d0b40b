"""The curves of a study's runs in few points, for its JSON and its page (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lbaccel.runs.read import Series
from lbaccel.runs.thin import kept, kept_together, rounded
from lbaccel.studies.one_run import CellRun

PANELS = ("train/loss", "train/top1", "val/loss", "val/top1")  # of a page, in its order
FEWEST_POINTS, MOST_POINTS = 25, 200  # of a curve
ALL_POINTS = 20_000  # of all curves of a study, so that its page stays small
Row = list[float | int | None]


def panels_with(metric: str) -> tuple[str, ...]:
    """The metrics that are drawn, that of the verdict among them.

    >>> panels_with("val/top5")[-2:]
    ('val/top1', 'val/top5')
    """
    return tuple(dict.fromkeys((*PANELS, metric)))


def curves_of(runs: Sequence[CellRun], metric: str) -> list[dict[str, Any]]:
    """Of each run its history, which of its curves are thinned, and its noise scale.

    A point is update, samples, hours, value. The lowest and the highest value of each stretch of a
    curve are kept. The seeds of a place have points at the same updates, for their mean. `thinned`
    has the number of logged points of each curve of which some are left out.
    """
    names = panels_with(metric)
    read = sum(one.run is not None for one in runs)
    most = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // (len(names) * max(1, read))))
    found: list[dict[str, Any]] = [
        {"history": {}, "thinned": {}, "noise": _noise(one, most)} for one in runs
    ]
    places: dict[tuple[str, int], list[int]] = {}
    for i, one in enumerate(runs):
        places.setdefault((one.cell.arm, one.cell.batch), []).append(i)
    for of in places.values():
        for name in names:
            curves = {i: one.history[name] for i in of if (one := runs[i].run) is not None and (
                one.history.get(name))}  # fmt: skip
            each = [[(p.update, p.value) for p in series] for series in curves.values()]
            for (i, series), at in zip(curves.items(), kept_together(each, most), strict=True):
                found[i]["history"][name] = rows_of(series, at)
                if len(at) < len(series):
                    found[i]["thinned"][name] = len(series)
    return found


def rows_of(series: Series, places: Sequence[int]) -> list[Row]:
    """Update, samples, hours and value of a curve at these places."""
    points = [series[i] for i in places]
    return [[p.update, p.samples_seen, rounded(p.hours), rounded(p.value)] for p in points]


def _noise(one: CellRun, most: int) -> list[Row]:
    rows = one.numbers["noise"]
    return [rows[i] for i in kept([row[2] for row in rows], most)]
