"""Resumes of a run, and updates that ran out of memory, as marks on its curves (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.report.chart import Landmark
from lbaccel.runs.read import Point

_WORDS = {"oom": "out of memory"}


def marks_of(
    events: Sequence[Mapping[str, Any]], history: Mapping[str, Sequence[Point]]
) -> list[Landmark]:
    """The events on each axis; one that lies at no logged update has its update alone."""
    places = {p.update: p for series in history.values() for p in series}
    marks = []
    for event in events:
        point, kind = places.get(event["update"]), str(event["kind"])
        x: dict[str, float | int | None] = {"updates": event["update"]}
        if point is not None:
            x |= {"samples": point.samples_seen, "hours": point.hours}
        marks.append(Landmark(_WORDS.get(kind, kind), x=x))
    return marks
