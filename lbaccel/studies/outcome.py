"""The one number that a run gives a study: the median of its last evaluations (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lbaccel.errors import InputError
from lbaccel.runs.read import Point, load_run
from lbaccel.studies.spec import Study


def final_value(points: Sequence[Point], last: int) -> float | None:
    """The median of the last evaluations, never the best; None where one of them has no value.

    Goyal et al. 2017, section 5: "the median error of the final 5 epochs".

    >>> final_value([Point(i, i, None, v) for i, v in enumerate((9.0, 5.0, 7.0, 6.0))], last=3)
    6.0
    """
    values = [point.value for point in points[-last:]]
    if not values or any(value is None for value in values):
        return None
    return float(median(value for value in values if value is not None))


def unreadable(run: Path) -> str | None:
    """Why the files of a run can't be read, a sentence; None where they can."""
    try:
        load_run(run)
    except InputError as error:
        return str(error)
    return None


def value_in(run: Path, study: Study) -> float | None:
    """Of a run folder; None where it has none, or can't be read."""
    try:
        history = load_run(run).history
    except InputError:
        return None
    return final_value(history.get(study.metric, ()), study.last)
