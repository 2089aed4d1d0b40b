"""The figures of a study over batch size, and the curves of its runs (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lbaccel.report.chart import Chart, Stroke, table_of_points
from lbaccel.report.curves import POINTS, Strand, panels, share_of_points
from lbaccel.report.verdict import number
from lbaccel.runs.compare import lower_is_better
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.read import Point, Series
from lbaccel.runs.thin import all_rounded
from lbaccel.studies.curves import panels_with

Result = Mapping[str, Any]
BATCH = "batch"
BATCH_AXIS = {BATCH: "global batch size (samples an update, log2)"}
LONGEST_LABEL = 18  # at the end of a line


def value_by_batch(result: Result, key: str) -> Chart | None:
    """Error (of a top-1) or the metric itself against batch size: a line an arm, all in one panel.

    The source's own numbers are hollow marks.
    """
    rows = [row for row in result["table"] if row["mean"] is not None]
    if not rows:
        return None
    metric = result["metric"]
    is_error = unit_of(metric) == " (%)" and not lower_is_better(metric)
    lines: list[Stroke] = []
    for color, arm in enumerate(result["arms"]):
        own = [row for row in rows if row["arm"] == arm["name"]]
        lines += _arm_by_batch(arm, own, color, is_error=is_error)
        expected = [
            row
            for row in result["table"]
            if row["arm"] == arm["name"] and row.get("expected") is not None
        ]
        if expected:
            values = [_turned(row["expected"], is_error) for row in expected]
            lines.append(
                Stroke(
                    f"{_title(arm)}: the source",
                    {BATCH: [row[BATCH] for row in expected]},
                    all_rounded(values),
                    color,
                    "hollow",
                )
            )
    what = "Error" if is_error else metric
    chart = Chart(
        key=key,
        title=f"{what} against batch size",
        alt=f"{what} of each arm against the global batch size: " + _arms_in_words(result, rows),
        x_labels=BATCH_AXIS,
        y_label=f"{metric} error, 100 less top-1 (%)" if is_error else f"{metric}{unit_of(metric)}",
        lines=lines,
        x_kind="log2",
        note="Bars are Student's 95 % intervals over seeds."
        + (" Hollow marks are the source's own numbers." * any(x.style == "hollow" for x in lines)),
    )
    head, cells = table_of_points(chart)
    return replace(chart, head=head, rows=cells)


def _title(arm: Mapping[str, Any]) -> str:
    return str(arm.get("title") or arm["name"])


def _turned(value: float | None, is_error: bool) -> float | None:
    return 100 - value if is_error and value is not None else value


def _arm_by_batch(
    arm: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], color: int, *, is_error: bool
) -> list[Stroke]:
    if not rows:
        return []
    names = ("high", "low") if is_error else ("low", "high")
    ends = [[_turned(row.get(name), is_error) for name in names] for row in rows]
    known = any(low is not None for low, _ in ends)
    title = _title(arm)
    label = title if len(title) <= LONGEST_LABEL else str(arm["name"])[:LONGEST_LABEL]
    return [
        Stroke(
            _title(arm),
            {BATCH: [row[BATCH] for row in rows]},
            all_rounded([_turned(row["mean"], is_error) for row in rows]),
            color,
            "line-points",
            low=all_rounded([low for low, _ in ends]) if known else None,
            high=all_rounded([high for _, high in ends]) if known else None,
            label=label,
        )
    ]


def _arms_in_words(result: Result, rows: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for arm in result["arms"]:
        own = [row for row in rows if row["arm"] == arm["name"]]
        if own:
            ends = (
                f"{number(r['mean'], result['metric'])} at {r[BATCH]:,}" for r in (own[0], own[-1])
            )
            said.append(f"{_title(arm)} has {' and '.join(ends)}")
    return "; ".join(said) + "."


def train_beside_test(result: Result, key: str) -> list[Chart]:
    """A panel an arm: training and validation against batch size; the sign of the gap in words."""
    metric, found = result["metric"], []
    for place, arm in enumerate(result["arms"]):
        rows = [
            row
            for row in result["table"]
            if row["arm"] == arm["name"]
            and row["mean"] is not None
            and row.get("train_mean") is not None
        ]
        if not rows:
            continue
        batches = [row[BATCH] for row in rows]
        gaps = [row["train_mean"] - row["mean"] for row in rows]
        lines = [
            Stroke(
                "training",
                {BATCH: batches},
                all_rounded([r["train_mean"] for r in rows]),
                1,
                "line-points",
                label="training",
            ),
            Stroke(
                "validation",
                {BATCH: batches},
                all_rounded([r["mean"] for r in rows]),
                0,
                "line-points",
                label="validation",
            ),
        ]
        chart = Chart(
            key=f"{key}-{place}",
            title=_title(arm),
            alt=f"Training and validation {metric} of {_title(arm)} against batch size. "
            + _gap_in_words(batches, gaps),
            x_labels=BATCH_AXIS,
            y_label=f"{metric.rpartition('/')[2].replace('top1', 'top-1')}{unit_of(metric)}",
            lines=lines,
            x_kind="log2",
            note=_gap_in_words(batches, gaps),
        )
        head, cells = table_of_points(chart)
        found.append(replace(chart, head=head, rows=cells))
    return found


def _gap_in_words(batches: Sequence[int], gaps: Sequence[float]) -> str:
    each = ", ".join(f"{gap:+.2f} at {b:,}" for b, gap in zip(batches, gaps, strict=True))
    return f"Training less validation: {each}."


def curves_of_arms(
    result: Result, prefix: str, points: int = POINTS
) -> list[tuple[str, list[Chart]]]:
    """For each arm the 2 x 2 panels of its curves, a colour a batch size."""
    strands = [
        (arm, [s for b in result["batches"] if (s := _strand(result, arm["name"], b))])
        for arm in result["arms"]
    ]
    found = [(arm, own) for arm, own in strands if own]
    metrics = panels_with(result["metric"])
    share = share_of_points([own for _, own in found], metrics, points)
    target = result.get("target")
    aim = (target["metric"], target["value"]) if target else None
    return [
        (
            _title(arm),
            panels(
                own,
                f"{prefix}-curves-{place}",
                share=share,
                metrics=metrics,
                of=_title(arm),
                thinned=[
                    name
                    for run in result["runs"]
                    if run["arm"] == arm["name"]
                    for name in run.get("thinned") or ()
                ],
                target=aim,
            ),
        )
        for place, (arm, own) in enumerate(found)
    ]


def _strand(result: Result, arm: str, batch: int) -> Strand | None:
    own = [run for run in result["runs"] if run["arm"] == arm and run[BATCH] == batch]
    own = [run for run in own if run.get("history")]
    if not own:
        return None
    runs = [(_run_name(run), _history(run["history"])) for run in own]
    done = [i for i, run in enumerate(own) if run["status"] == "done"]
    color = list(result["batches"]).index(batch)
    return Strand(f"batch {batch:,}", f"{batch:,}", runs, done if len(done) > 1 else (), color)


def _run_name(run: Mapping[str, Any]) -> str:
    end = "" if run["status"] == "done" else f" ({run['status']})"
    return f"batch {run[BATCH]:,}, seed {run['seed']}{end}"


def _history(history: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, Series]:
    return {name: tuple(Point(*point) for point in points) for name, points in history.items()}
