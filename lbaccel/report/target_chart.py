"""The figure of a study that has a target: updates to it against batch size (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lbaccel.report.chart import Chart, Landmark, Numbers, Stroke, Style, table_of_points
from lbaccel.report.study_charts import BATCH, BATCH_AXIS, LONGEST_LABEL, Result
from lbaccel.runs.thin import all_rounded

_FITTED = 40  # points of a fitted curve


def updates_to_target(result: Result, key: str) -> Chart | None:
    """Updates to the target against batch size, log-log; None where the study has no target.

    Each arm has its seeds' mean, the line of perfect scaling through the smallest batch that has
    one, and the fitted bend S(B) = S_min (1 + B_crit / B) with the critical batch marked.
    """
    found, target = result.get("to_target") or [], result.get("target")
    if not found or not target:
        return None
    titles = {arm["name"]: arm.get("title") or arm["name"] for arm in result["arms"]}
    lines: list[Stroke] = []
    marks: list[Landmark] = []
    for color, arm in enumerate(found):
        lines += _arm_to_target(arm, titles.get(arm["arm"], arm["arm"]), color)
        marks += _critical(arm, color, only=len(found) == 1)
    if not any(value for line in lines for value in line.y):
        return None
    name = f"{target['metric']} of {target['value']:g}"
    chart = Chart(
        key=key,
        title=f"Updates to {name} against batch size",
        alt=f"Updates until {name} is reached, against the global batch size, both on log axes. "
        + " ".join(arm["sentence"] for arm in found),
        x_labels=BATCH_AXIS,
        y_label="updates to target (optimizer steps, log)",
        lines=lines,
        x_kind="log2",
        y_kind="log",
        marks=marks,
        note="Dots are means over seeds, small dots the seeds. A "
        "hollow dot is a batch size of which a seed did not reach it (censored): the mean of those "
        "that did, which is a lower bound. Dotted: perfect scaling, "
        "half the updates for twice the batch. Dashed: the fitted bend; its critical batch is the "
        "vertical line.",
    )
    head, rows = table_of_points(chart)
    return replace(chart, head=head, rows=rows)


def _arm_to_target(arm: Mapping[str, Any], title: str, color: int) -> list[Stroke]:
    points = [p for p in arm["points"] if p["mean_met"] is not None]
    if not points:
        return []
    whole = [p for p in points if p["mean"] is not None]
    cut = [p for p in points if p["mean"] is None]  # a seed is censored

    def line(name: str, style: Style, at: Numbers, values: Numbers, **more: Any) -> Stroke:
        return Stroke(name, {BATCH: all_rounded(at)}, all_rounded(values), color, style, **more)

    batches = [p[BATCH] for p in points]
    lines: list[Stroke] = []
    if whole:  # a lower bound is no place to draw a line from
        at = [b for b in batches if b >= whole[0][BATCH]]
        perfect = [whole[0]["mean"] * whole[0][BATCH] / b for b in at]
        lines.append(line(f"{title}: perfect scaling", "reference", at, perfect, listed=False))
    fit = arm.get("fit")
    if fit and len(batches) > 1:
        at = _between(batches[0], batches[-1])
        bend = [fit["min_updates"] * (1 + fit["critical_batch"] / b) for b in at]
        lines.append(line(f"{title}: fitted bend", "dash", at, bend, listed=False))
    seeds = [(p[BATCH], value) for p in points for value in p["updates"] if value is not None]
    at, values = [b for b, _ in seeds], [value for _, value in seeds]
    lines.append(line(f"{title}: each seed", "seeds", at, values, listed=False))
    if cut:
        at, values = [p[BATCH] for p in cut], [p["mean_met"] for p in cut]
        lines.append(line(f"{title}: a seed is censored", "hollow", at, values, listed=False))
    label = title if len(title) <= LONGEST_LABEL else str(arm["arm"])[:LONGEST_LABEL]
    at, values = [p[BATCH] for p in whole], [p["mean"] for p in whole]
    return [*lines, line(title, "points", at, values, label=label)]


def _critical(arm: Mapping[str, Any], color: int, *, only: bool) -> list[Landmark]:
    """The measured critical batch, with its interval where one arm has the chart to itself."""
    marks = []
    fit, noise = arm.get("fit"), arm.get("noise_scale")
    if fit:
        batch = fit["critical_batch"]
        name = f"critical batch {batch:,.0f}" if only else f"{arm['arm']}: {batch:,.0f}"
        ends = (fit.get("low"), fit.get("high")) if only else (None, None)
        marks.append(Landmark(name, x={BATCH: batch}, low=ends[0], high=ends[1], color=color))
    if noise and only:
        batch = noise["critical_batch"]
        marks.append(Landmark(f"by the noise scale {batch:,.0f}", x={BATCH: batch}))
    return marks


def _between(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (i / (_FITTED - 1)) for i in range(_FITTED)]
