"""Resumes of a run, and updates that ran out of memory, as marks on its curves (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lbaccel.report.chart import Landmark
from lbaccel.runs.folder import RESUMES
from lbaccel.runs.read import Point, Run, read_metrics

RESUME, OOM = "resume", "oom"
_WORDS = {RESUME: "resume", OOM: "out of memory"}


def events_of(one: Run, folder: Path | None) -> list[dict[str, Any]]:
    """Kind, update and a sentence of each, as the JSON of a study has them, in order of updates.

    A resume is a line of `resumes.jsonl`. A smaller micro-batch between two lines of metrics, where
    the run was not resumed in between, is an update that ran out of memory and was done again.
    """
    resumes = _resumes(folder)
    found = [
        {
            "kind": RESUME,
            "update": line["update"],
            "text": f"resumed after update {line['update']:,}"
            + (f" with {line['plan']}" if isinstance(line.get("plan"), str) else ""),
        }
        for line in resumes
    ]
    at = [line["update"] for line in resumes]
    series = [p for p in one.history.get("batch/micro", ()) if p.value]
    for before, after in pairwise(series):
        resumed = any(before.update <= update < after.update for update in at)
        if after.value < before.value and not resumed:  # type: ignore[operator]  # both are numbers
            text = (
                f"out of memory up to update {after.update:,}: the micro-batch went from "
                f"{before.value:g} to {after.value:g}, and the update was done again"
            )
            found.append({"kind": OOM, "update": after.update, "text": text})
    return sorted(found, key=lambda event: event["update"])


def _resumes(folder: Path | None) -> list[dict[str, Any]]:
    if folder is None or not (folder / RESUMES).is_file():
        return []
    return read_metrics(folder / RESUMES)


def marks_of(
    events: Sequence[Mapping[str, Any]], history: Mapping[str, Sequence[Point]]
) -> list[Landmark]:
    """The events on each axis; one that lies at no logged update has its update alone."""
    places = {p.update: p for series in history.values() for p in series}
    marks = []
    for event in events:
        point = places.get(event["update"])
        x: dict[str, float | int | None] = {"updates": event["update"]}
        if point is not None:
            x |= {"samples": point.samples_seen, "hours": point.hours}
        marks.append(Landmark(_WORDS.get(str(event["kind"]), str(event["kind"])), x=x))
    return marks
