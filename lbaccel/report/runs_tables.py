"""The tables of a page on runs: a row a group, and a row a run (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.report import verdict
from lbaccel.report.verdict import ends
from lbaccel.runs.compare import Cell, cells_of, formatted
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.groups import (
    Group,
    Mean,
    are_grouped,
    differing_settings,
    group_rows,
    numbers_of,
)
from lbaccel.runs.read import Run


def group_table(groups: Sequence[Group], metric: str, last: int) -> dict[str, Any]:
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


def run_table(
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, Cell]],
    groups: Sequence[Group],
    metric: str,
    *,
    prefix: str,
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
    links = [f"{prefix}-run-{number}" for number in range(1, len(runs) + 1)]
    head = [title.replace("_", " ") if title not in told else title for title in cells[0]]
    return {"head": head, "rows": cells[1:], "links": links}
