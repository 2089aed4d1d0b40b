"""The part of a page on a study, out of the JSON of its results (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.report import study_charts as charts_of
from lbaccel.report import study_tables as tables
from lbaccel.report.curves import POINTS
from lbaccel.report.page import Part
from lbaccel.report.pictures import PictureRoom
from lbaccel.report.provenance import entries, shared_and_own
from lbaccel.report.target_chart import updates_to_target
from lbaccel.studies.rules import study_rule
from lbaccel.studies.verdict import once
from lbaccel.text import without_tokens

Result = Mapping[str, Any]


def of_study(
    result: Result,
    folder: Path,
    *,
    number: int = 1,
    room: PictureRoom | None = None,
    points: int = POINTS,
) -> Part:
    """The part on a study.

    Args:
        result: as `study_result` gives it.
        folder: of the study, in which its figures lie.
        number: of the part in the page.
        room: the bytes that pictures may take.
        points: how many the curves may have together.
    """
    prefix = f"study-{number}"
    updates = updates_to_target(result, f"{prefix}-updates")
    error = charts_of.value_by_batch(result, f"{prefix}-value")
    gaps = charts_of.train_beside_test(result, f"{prefix}-gap")
    curves = charts_of.curves_of_arms(result, prefix, points)
    runs = result["runs"]
    shared, own = shared_and_own([entries(run.get("provenance") or {}) for run in runs])
    content: dict[str, Any] = {
        "kind": "study",
        "prefix": prefix,
        "title": result["title"],
        "about": _about(result),
        "question": result.get("question"),
        "source": _source(result.get("source")),
        "study_note": result.get("note"),
        "verdict": _verdict(result),
        "rule": _rule(result),
        "warnings": result.get("warnings") or [],
        "lost": _lost(runs),
        "updates": updates,
        "to_target": [one["sentence"] for one in result.get("to_target") or []],
        "error": error,
        "table": tables.results(result),
        "aggregates": tables.aggregates(result),
        "comparisons": tables.comparisons(result),
        "limits": tables.limits(result),
        "noise_scale": tables.noise_scale(result),
        "gaps": gaps,
        "gap_table": tables.gaps(result) if gaps else None,
        "arms": [
            {"title": title, "charts": views, "open": place == 0}
            for place, (title, views) in enumerate(curves)
        ],
        "tuning": tables.tuning(result),
        "figures": _figures(result, folder, room or PictureRoom()),
        "settings": dict(result.get("settings") or {}),
        "run_table": tables.run_table(result, prefix),
        "shared": list(shared.items()),
        "runs": _details(runs, own),
    }
    drawn = [*filter(None, [updates, error]), *gaps, *(c for _, views in curves for c in views)]
    return Part(content, _without_curves(result), drawn)


def _details(
    runs: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": run["cell"],
            "entries": list(mine.items()),
            "reproduce": without_tokens((run.get("provenance") or {}).get("reproduce") or ""),
            "status": run["status"],
            "reason": run.get("exit_reason"),
            "events": "; ".join(event["text"] for event in run.get("events") or ()),
        }
        for run, mine in zip(runs, own, strict=True)
    ]


def _without_curves(result: Result) -> dict[str, Any]:
    """The result without what the charts hold: histories of many runs pass the page's bound."""
    left_out = ("history", "noise")
    runs = [{k: v for k, v in run.items() if k not in left_out} for run in result["runs"]]
    return {**result, "runs": runs}


def _about(result: Result) -> str:
    arms, batches, seeds = result["arms"], result["batches"], result["seeds"]
    counts = [(len(arms), "arm"), (len(batches), "batch size"), (len(seeds), "seed")]
    said = " x ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts)
    scale = f", scale {result['scale']}" if result.get("scale") else ""
    return f"Study {result['name']}{scale}: {said}, {len(once(result['runs']))} runs."


def _source(source: Mapping[str, Any] | None) -> str | None:
    if not source:
        return None
    year = f" ({source['year']})" if source.get("year") else ""
    where = f", {source['where']}" if source.get("where") else ""
    return f"{source['authors']}{year}: {source['title']}{where}"


def _rule(result: Result) -> str:
    return f"{study_rule(result)} Wilson's interval is over the test images, and is another thing."


def _verdict(result: Result) -> list[str]:
    """The sentences that stand at no other place of the page."""
    below = {study_rule(result), *(one["sentence"] for one in result.get("to_target") or ())}
    said = [line for line in result["verdict"] if line not in below]
    return said or ["No run of this study has come to its end."]


def _lost(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on runs that diverged, failed, have not ended, or did not reach the target."""
    own, found = once(runs), []
    for status, words in (
        ("diverged", "diverged and count as such"),
        ("failed", "failed"),
        ("stopped", "stopped and can go on"),
        ("running", "still go on"),
        ("missing", "are missing"),
    ):
        names = [run["cell"] for run in own if run["status"] == status]
        if names:
            found.append(f"{len(names)} of {len(own)} runs {words}: {_some(names)}.")
    censored = [run["cell"] for run in own if run.get("censored")]
    if censored:
        found.append(
            f"{len(censored)} of {len(own)} runs ended without reaching the target (censored): "
            f"{_some(censored)}."
        )
    return found


def _figures(result: Result, folder: Path, room: PictureRoom) -> list[dict[str, Any]]:
    found = []
    for one in result.get("figures") or ():
        path = (folder / str(one["file"])).resolve()
        inside = path.is_relative_to(folder.resolve())
        source, note = room.embedded(path) if inside else (None, "lies outside the study's folder.")
        found.append({"name": one["name"], "alt": one["alt"], "source": source, "note": note})
    return found


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
