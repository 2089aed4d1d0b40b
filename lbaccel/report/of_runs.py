"""The part of a page on runs: verdict, groups, curves, and what is known of a single run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.recipe.experiment import beside_defaults, with_experiment
from lbaccel.report import of_one, verdict
from lbaccel.report.chart import Chart, Landmark
from lbaccel.report.curves import POINTS, panels, share_of_points
from lbaccel.report.events import marks_of
from lbaccel.report.page import Part
from lbaccel.report.pictures import PictureRoom
from lbaccel.report.provenance import entries, is_on_cpu, provenance_of, shared_and_own
from lbaccel.report.runs_strands import strands_of
from lbaccel.report.runs_tables import group_table, run_table
from lbaccel.runs.compare import (
    distinct_names,
    split_settings,
    table,
)
from lbaccel.runs.groups import (
    Group,
    are_grouped,
    comparison,
    ended,
    groups_of,
    left_out,
    with_groups,
)
from lbaccel.runs.read import Run
from lbaccel.studies.curves import panels_with
from lbaccel.studies.one_run import events
from lbaccel.studies.rules import over_images

PREFIX = "runs"  # of the part's names in the page


def of_runs(
    loaded: Sequence[tuple[Run, Path | None]],
    *,
    metric: str = "val/top1",
    target: float | None = None,
    room: PictureRoom | None = None,
    points: int = POINTS,
) -> Part:
    """The part on these runs, each with its folder where it has one.

    Raises:
        InputError: no run has logged the metric.
    """
    room = room or PictureRoom()
    folders = [folder for _, folder in loaded]
    whole = distinct_names([one for one, _ in loaded])
    runs = with_experiment(whole)
    rows = table(runs, metric, target=target)
    groups = groups_of(runs)
    data = comparison(runs, with_groups(runs, rows, groups, metric), groups, metric)
    equal, _ = split_settings([one.config for one in runs])
    told = beside_defaults(equal)
    last = verdict.num_last(runs, metric)
    found = [provenance_of(one, folder) for one, folder in zip(whole, folders, strict=True)]
    shared, own = shared_and_own([entries(one) for one in found])
    share = share_of_points([strands_of(runs, groups)], panels_with(metric), points)
    happened = events(whole[0], folders[0]) if len(runs) == 1 else []
    marks = marks_of(happened, whole[0].history)
    charts = _curves(runs, groups, metric=metric, target=target, share=share, marks=marks)
    single = None
    if len(runs) == 1:
        single = {"events": happened, "evaluation": of_one.evaluation(folders[0], room)}
        single |= of_one.drawn(whole[0], share=share, marks=marks, on_cpu=is_on_cpu(found[0]))
    content = {
        "kind": "runs",
        "prefix": PREFIX,
        "title": _title(whole),
        "about": _about(runs, groups),
        "verdict": [
            *verdict.sentences(groups, metric, last),
            *_over_images(runs, whole, metric, last),
        ],
        "rule": verdict.how_counted(metric, last, groups),
        "settings": told,
        "num_defaults": len(equal) - len(told),
        "num_runs": len(runs),
        "groups": group_table(groups, metric, last) if are_grouped(groups) else None,
        "rows": run_table(runs, rows, groups, metric, prefix=PREFIX),
        "notes": [
            *left_out(groups, metric),
            *_did_not_end(runs),
            *(n for o in whole for n in o.notes),
        ],
        "charts": charts,
        "single": single,
        "shared": list(shared.items()),
        "runs": _details(runs, own, found),
    }
    of_single = [] if single is None else [*single["panels"], *filter(None, [single["noise"]])]
    return Part(content, data, [*charts, *of_single])


def _curves(
    runs: Sequence[Run],
    groups: Sequence[Group],
    *,
    metric: str,
    target: float | None,
    share: Mapping[str, int],
    marks: Sequence[Landmark],
) -> list[Chart]:
    return panels(
        strands_of(runs, groups),
        PREFIX,
        share=share,
        metrics=panels_with(metric),
        marks=marks,
        of=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        target=None if target is None else (metric, target),
    )


def _details(
    runs: Sequence[Run],
    own: Sequence[Mapping[str, str]],
    found: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    return [
        {
            "name": run.name,
            "entries": list(mine.items()),
            "reproduce": of["reproduce"],
            "status": run.summary.get("status"),
            "reason": run.summary.get("exit_reason"),
        }
        for run, mine, of in zip(runs, own, found, strict=True)
    ]


def _title(whole: Sequence[Run]) -> str:
    if len(whole) == 1:
        return whole[0].name
    equal, _ = split_settings([one.config for one in whole])
    what = " on ".join(str(equal[name]) for name in ("model", "data") if equal.get(name))
    return f"{len(whole)} runs" + (f" of {what}" if what else "")


def _about(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    if len(runs) == 1:
        return "One run."
    if len(groups) == 1:
        return f"{len(runs)} runs that differ only in their seed."
    if not are_grouped(groups):
        return f"{len(runs)} runs of different settings."
    return (
        f"{len(runs)} runs in {len(groups)} groups; the runs of a group differ only in their seed."
    )


def _over_images(runs: Sequence[Run], whole: Sequence[Run], metric: str, last: int) -> list[str]:
    """Of a single run Wilson's interval of a top-1, where the number of images is known."""
    n = whole[0].config.get("data_identity/num_val")
    ends = over_images(verdict.value_of(runs[0], metric, last), n, metric)
    if len(whole) != 1 or ends is None:
        return []
    return [
        f"Over the {n:,} validation images its interval is {ends[0]:.2f} to {ends[1]:.2f} % "
        "(Wilson, 95 %): that is the chance in the choice of images, and not the chance over seeds."
    ]


def _did_not_end(runs: Sequence[Run]) -> list[str]:
    notes = []
    for one in runs:
        if not ended(one):
            reason = one.summary.get("exit_reason")
            more = f": {reason}" if isinstance(reason, str) and reason else ""
            notes.append(f"{one.name} is {one.summary.get('status')}{more}")
    return notes
