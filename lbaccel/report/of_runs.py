"""The part of a page on runs: verdict, groups, curves, and what is known of a single run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.recipe.experiment import beside_defaults, with_experiment
from lbaccel.report import of_one, verdict
from lbaccel.report.chart import Chart
from lbaccel.report.curves import POINTS, Strand, panels, share_of_points
from lbaccel.report.events import marks_of
from lbaccel.report.page import Part
from lbaccel.report.pictures import PictureRoom
from lbaccel.report.provenance import entries, is_on_cpu, provenance_of, shared_and_own
from lbaccel.report.verdict import ends
from lbaccel.runs.compare import (
    Cell,
    cells_of,
    distinct_names,
    formatted,
    split_settings,
    table,
)
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.groups import (
    SEED,
    Group,
    Mean,
    are_grouped,
    comparison,
    differing_settings,
    ended,
    group_rows,
    groups_of,
    label_of,
    left_out,
    numbers_of,
    with_groups,
)
from lbaccel.runs.read import Run
from lbaccel.studies.curves import panels_with
from lbaccel.studies.one_run import events
from lbaccel.studies.rules import over_images

PREFIX = "runs"  # of the part's names in the page
_LONGEST_LABEL = 16  # at the end of a line


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
    charts, single = _drawn(
        runs, whole, folders, groups, metric=metric, target=target, room=room, points=points
    )
    found = [provenance_of(one, folder) for one, folder in zip(whole, folders, strict=True)]
    shared, own = shared_and_own([entries(one) for one in found])
    details = [
        {
            "name": run.name,
            "entries": list(mine.items()),
            "reproduce": of["reproduce"],
            "status": run.summary.get("status"),
            "reason": run.summary.get("exit_reason"),
        }
        for run, mine, of in zip(runs, own, found, strict=True)
    ]
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
        "groups": _group_table(groups, metric, last) if are_grouped(groups) else None,
        "rows": _run_table(runs, rows, groups, metric),
        "notes": [
            *left_out(groups, metric),
            *_did_not_end(runs),
            *(n for o in whole for n in o.notes),
        ],
        "charts": charts,
        "single": single,
        "shared": list(shared.items()),
        "runs": details,
    }
    of_single = [] if single is None else [*single["panels"], *filter(None, [single["noise"]])]
    return Part(content, data, [*charts, *of_single])


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


def _strands(runs: Sequence[Run], groups: Sequence[Group]) -> list[Strand]:
    settings = differing_settings(groups)
    grouped = are_grouped(groups)
    found = []
    for number, (group, differing) in enumerate(zip(groups, settings, strict=True), 1):
        label = label_of(differing, number)
        short = label if len(label) <= _LONGEST_LABEL else f"group {number}"
        name = f"group {number}: {label}" if differing else label
        if not grouped:
            name = group.runs[0].name if not differing else f"{group.runs[0].name} ({label})"
            short = label if len(label) <= _LONGEST_LABEL else f"run {number}"
        if len(groups) == 1:
            name, short = ("all runs" if grouped else group.runs[0].name), ""
        counted = [i for i, one in enumerate(group.runs) if ended(one)]
        seeds = {group.runs[i].config.get(SEED) for i in counted}
        averaged = counted if len(seeds) == len(counted) > 1 else []
        found.append(Strand(name, short, [(r.name, r.history) for r in group.runs], averaged))
    return found


def _drawn(
    runs: Sequence[Run],
    whole: Sequence[Run],
    folders: Sequence[Path | None],
    groups: Sequence[Group],
    *,
    metric: str,
    target: float | None,
    room: PictureRoom,
    points: int,
) -> tuple[list[Chart], dict[str, Any] | None]:
    """The curves, and what there is of a single run."""
    strands = _strands(runs, groups)
    metrics = panels_with(metric)
    share = share_of_points([strands], metrics, points)
    aim = None if target is None else (metric, target)
    alone = len(runs) == 1
    happened = events(whole[0], folders[0]) if alone else []
    marks = marks_of(happened, whole[0].history)
    words = whole[0].name if alone else f"{len(runs)} runs"
    charts = panels(
        strands, "runs", share=share, metrics=metrics, marks=marks, of=words, target=aim
    )
    if not alone:
        return charts, None
    on_cpu = is_on_cpu(folders[0])
    return charts, {
        "facts": of_one.facts(whole[0], on_cpu=on_cpu),
        "events": happened,
        "panels": of_one.more_panels(whole[0], "one", share=share, marks=marks, on_cpu=on_cpu),
        "noise": of_one.noise_chart(whole[0], "noise"),
        "evaluation": of_one.evaluation(folders[0], room),
    }


def _group_table(groups: Sequence[Group], metric: str, last: int) -> dict[str, Any]:
    """A row a group: what tells it apart, its value, and its difference to the first group."""
    unit = unit_of(metric)
    points = " (points)" if unit == " (%)" else ""
    of = f"median of last {last}" if last > 1 else "last"
    told = [list(row) for row in differing_settings(groups)]
    head = [
        *("group", *told[0], "seeds", f"{of} {metric}{unit}", "95 % interval"),
        *(
            f"difference to group 1{points}",
            "95 % interval, paired",
            "verdict",
            f"best {metric}{unit}",
        ),
    ]
    rows = []
    for row, group, settings in zip(
        group_rows(groups, metric), groups, differing_settings(groups), strict=True
    ):
        found = Mean(tuple(verdict.outcomes_of(group, metric, last).values.values()))
        cells = [str(row["group"]), *(formatted(k, v) for k, v in settings.items()), str(found.n)]
        cells += [
            verdict.number(found.mean, metric),
            ends(*(found.interval or (None, None)), metric=metric),
        ]
        if group is groups[0]:
            cells += ["-", "-", "-"]
        else:
            apart = verdict.judged(group, groups[0], metric, last)
            gap = apart.difference
            cells += ["-" if gap is None else f"{gap:+.2f}" if points else f"{gap:+.4g}"]
            cells += [ends(apart.low, apart.high, metric=metric, signed=True), apart.verdict]
        mean = row["mean"]
        cells.append(verdict.number(mean if isinstance(mean, float) else None, metric))
        rows.append(cells)
    return {"head": head, "rows": rows, "words": [len(head) - 2]}


def _run_table(
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, Cell]],
    groups: Sequence[Group],
    metric: str,
) -> dict[str, Any]:
    """The table of `lbaccel compare`, a row a run, with the number of its group."""
    wide = [dict(row) for row in rows]
    if are_grouped(groups):
        wide = [
            {"name": row["name"], "group": n, **{k: v for k, v in row.items() if k != "name"}}
            for n, row in zip(numbers_of(runs, groups), wide, strict=True)
        ]
    cells = cells_of(wide, metric)
    told = {name for one in runs for name in one.config}
    links = [f"{PREFIX}-run-{number}" for number in range(1, len(runs) + 1)]
    head = [title.replace("_", " ") if title not in told else title for title in cells[0]]
    return {"head": head, "rows": cells[1:], "links": links}
