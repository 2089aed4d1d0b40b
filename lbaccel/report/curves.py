"""The curves of runs as charts: each seed thin, the mean of a group thick (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lbaccel.report.chart import Chart, Landmark, Stroke
from lbaccel.report.verdict import number
from lbaccel.runs.compare import AXIS_LABELS
from lbaccel.runs.compare_figure import unit_of
from lbaccel.runs.read import Point, Series
from lbaccel.runs.thin import fair_share, kept, rounded
from lbaccel.studies.curves import PANELS

TITLES = {
    "train/loss": "Training loss",
    "train/top1": "Training top-1",
    "val/loss": "Validation loss",
    "val/top1": "Validation top-1",
}
POINTS = 36_000  # of all curves of a page; a point takes some 28 bytes
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of a run, in the table behind a chart
History = Mapping[str, Series]


@dataclass(frozen=True)
class Strand:
    """Runs that are drawn in one colour, with their mean.

    Args:
        name: of it, in the legend.
        label: short, at the end of its line; empty is none.
        runs: name and history of each.
        averaged: which of the runs the mean counts.
        color: a number; None is that of its place.
    """

    name: str
    label: str
    runs: Sequence[tuple[str, History]]
    averaged: Sequence[int] = ()
    color: int | None = None


def mean_series(series: Sequence[Series]) -> Series:
    """The mean where all series have a value at the same update; the hours are their mean too."""
    by_update = [{p.update: p for p in one} for one in series]
    found: list[Point] = []
    for point in series[0] if series else ():
        here = [one[point.update] for one in by_update if point.update in one]
        values = [p.value for p in here if p.value is not None]
        hours = [p.hours for p in here if p.hours is not None]
        if len(here) < len(series):
            continue
        mean = fmean(values) if len(values) == len(series) else None
        at = fmean(hours) if len(hours) == len(series) else None
        found.append(Point(point.update, point.samples_seen, at, mean))
    return tuple(found)


def share_of_points(
    groups_of_strands: Sequence[Sequence[Strand]], metrics: Sequence[str], points: int = POINTS
) -> dict[str, int]:
    """How many points a curve may have: evaluations come first, training has what is left."""
    lengths: dict[str, list[int]] = {"val": [], "train": []}
    for strands in groups_of_strands:
        for metric in metrics:
            side = "val" if metric.startswith("val/") else "train"
            for strand in strands:
                each = [len(history.get(metric, ())) for _, history in strand.runs]
                lengths[side] += [*each, *([max(each, default=0)] if len(each) > 1 else [])]
    val = fair_share(lengths["val"], 2 * points // 3)
    used = sum(min(length, val) for length in lengths["val"])
    return {"val": val, "train": fair_share(lengths["train"], points - used)}


def panels(
    strands: Sequence[Strand],
    key: str,
    *,
    share: Mapping[str, int],
    metrics: Sequence[str] = PANELS,
    marks: Sequence[Landmark] = (),
    of: str = "the runs",
    thinned: Sequence[str] = (),
    target: tuple[str, float] | None = None,
) -> list[Chart]:
    """A chart a metric that any run has logged, over samples, updates or hours.

    Args:
        strands: the runs.
        key: of the charts' keys the beginning.
        share: as `share_of_points` gives it.
        metrics: in order.
        marks: on each chart.
        of: the runs in words.
        thinned: metrics of which points are left out already.
        target: a metric and its value.
    """
    charts = []
    for place, metric in enumerate(metrics):
        if not any(history.get(metric) for strand in strands for _, history in strand.runs):
            continue
        most = share["val" if metric.startswith("val/") else "train"]
        lines, shortened = _lines(strands, metric, most)
        heights = [Landmark(f"target {target[1]:g}", y=target[1])] if target and (
            target[0] == metric
        ) else []  # fmt: skip
        name = TITLES.get(metric, metric)
        charts.append(
            Chart(
                key=f"{key}-{place}",
                title=name,
                alt=f"{name} of {of} over training. {_in_words(strands, metric)}",
                x_labels=_axes(lines),
                y_label=_y_label(metric),
                lines=lines,
                most=100.0 if unit_of(metric) == " (%)" else None,
                marks=[*heights, *marks],
                head=["run", *(f"at {100 * s:g} %" for s in _SHARES), "updates"],
                rows=_rows(strands, metric),
                note=_thinned(lines) if shortened or metric in thinned else "",
            )
        )
    return charts


def _thinned(lines: Sequence[Stroke]) -> str:
    most = max(len(line.y) for line in lines)
    return (
        f"Thinned to at most {most} points a curve; the lowest and the highest value of each "
        "stretch are kept."
    )


def _axes(lines: Sequence[Stroke]) -> dict[str, str]:
    """The axes on which any of the lines has a place."""
    return {
        axis: label
        for axis, label in AXIS_LABELS.items()
        if any(value is not None for line in lines for value in line.x[axis])
    } or {"updates": AXIS_LABELS["updates"]}


def _y_label(metric: str) -> str:
    if metric.endswith("/loss"):
        return "cross-entropy (nats)"
    return metric.rpartition("/")[2].replace("top1", "top-1") + unit_of(metric)


def _lines(strands: Sequence[Strand], metric: str, most: int) -> tuple[list[Stroke], bool]:
    thin: list[Stroke] = []
    thick: list[Stroke] = []
    thinned = False
    for place, strand in enumerate(strands):
        color = place if strand.color is None else strand.color
        series = [history.get(metric, ()) for _, history in strand.runs]
        averaged = [series[i] for i in strand.averaged if series[i]]
        mean = mean_series(averaged) if len(averaged) > 1 else ()
        thinned = thinned or any(len(one) > most for one in series)
        for (name, _), one in zip(strand.runs, series, strict=True):
            if one and mean:
                thin.append(_line(name, one, color, "thin", "", most))
            elif one:
                label = strand.label if len(strand.runs) == 1 else ""
                named = strand.name if len(strand.runs) == 1 else name
                thick.append(_line(named, one, color, "thick", label, most))
        if mean:
            name = f"{strand.name}, mean of {len(averaged)} seeds"
            thick.append(_line(name, mean, color, "thick", strand.label, most))
    return [*thin, *thick], thinned


def _line(name: str, series: Series, color: int, style: str, label: str, most: int) -> Stroke:
    points = [series[i] for i in kept([p.value for p in series], most)]
    return Stroke(
        name=name,
        x={
            "samples": [p.samples_seen for p in points],
            "updates": [p.update for p in points],
            "hours": [rounded(p.hours) for p in points],
        },
        y=[rounded(p.value) for p in points],
        color=color,
        style="thin" if style == "thin" else "thick",
        label=label,
    )


def _rows(strands: Sequence[Strand], metric: str) -> list[list[str]]:
    rows = []
    for strand in strands:
        for name, history in strand.runs:
            series = history.get(metric, ())
            if not series:
                continue
            cells = [number(_at(share, series), metric) for share in _SHARES]
            rows.append([name, *cells, f"{series[-1].update:,}"])
    return rows


def _at(share: float, series: Series) -> float | None:
    """The last value at so much of a run's updates; the first one where it comes later."""
    before = [p for p in series if p.update <= share * series[-1].update]
    return (before or series)[-1 if before else 0].value


def _in_words(strands: Sequence[Strand], metric: str) -> str:
    said = []
    for strand in strands[:6]:
        lasts = [
            h[metric][-1].value for _, h in strand.runs if h.get(metric) and h[metric][-1].value
        ]
        known = [value for value in lasts if value is not None]
        if known:
            said.append(f"{strand.name} ends at {number(fmean(known), metric)}")
    more = f", and {len(strands) - 6} more" if len(strands) > 6 else ""
    return f"{'; '.join(said)}{more}." if said else ""
