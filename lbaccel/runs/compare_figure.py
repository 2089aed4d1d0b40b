"""The curves of runs in one figure; runs that differ only in their seed have one colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.runs.compare import (
    AXIS_LABELS,
    Axis,
    as_cell,
    axis_value,
    check_metric,
    is_in_points,
    split_settings,
    value_or_nan,
)
from lbaccel.runs.figures import drawable, new_figure, save
from lbaccel.runs.groups import (
    LEVEL,
    SEED,
    Group,
    Mean,
    are_grouped,
    differing_settings,
    ended,
    groups_of,
    label_of,
)
from lbaccel.runs.read import Run
from lbaccel.text import in_figure

Curve = list[tuple[float, float]]
Band = tuple[list[tuple[float, Mean]], str]
MOST_SETTINGS = 2  # in a label


def plot(
    runs: Sequence[Run],
    path: Path,
    *,
    metric: str,
    x: Axis = "samples",
    target: float | None = None,
) -> None:
    """Draw the metric over an axis: a labelled curve a run, or a labelled mean a group of seeds.

    Of a group each run is a thin line; where all of its runs have a value, the mean is a thick one,
    in the band of its t-interval, which is cut at the limits that the curves give. A gap is a value
    that is not finite.

    Raises:
        InputError: no run has the metric on this axis, or `path` has another ending.
    """
    check_metric(runs, metric)
    drawable(path)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    groups = groups_of(runs)
    bands: list[Band] = []
    if are_grouped(groups):
        for number, (group, settings) in enumerate(
            zip(groups, differing_settings(groups), strict=True), 1
        ):
            means = _draw_group(axes, group, label_of(settings, number), number, metric, x)
            bands += [(means, f"C{number - 1}")] if means else []
    else:
        for number, (one, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
            _draw(axes, curve_of(one, metric, x), f"C{number}", label=label)
    if not any(curve_of(one, metric, x) for one in runs):
        raise InputError(f"--x {x}: no run has logged {metric} on this axis. Use --x updates")
    if target is not None:
        axes.axhline(target, color="0.4", linestyle="--", linewidth=1, label=f"target {target:g}")
    if bands:
        _draw_bands(axes, bands)
    axes.set_xlabel(AXIS_LABELS[x])
    axes.set_ylabel(in_figure(metric) + unit_of(metric))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if x == "samples":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    save(figure, path)


def curve_of(one: Run, metric: str, x: Axis) -> Curve:
    """The points of a run that stand on the axis."""
    points = [(axis_value(p, x), value_or_nan(p.value)) for p in one.history.get(metric, ())]
    return [(at, value) for at, value in points if at is not None]


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Mean]]:
    """The mean at each place where all curves have a point."""
    values = [dict(curve) for curve in curves]
    shared = [at for at, _ in curves[0] if all(at in of for of in values)] if curves else []
    return [(at, Mean(tuple(of[at] for of in values))) for at in shared]


def _draw(axes: Any, curve: Curve, color: str, *, label: str | None, **style: Any) -> None:
    marker = "o" if len(curve) <= 30 else ""
    style = {"marker": marker, "ls": "-", "ms": 4, **style}
    if label is not None:
        label = in_figure(label if curve else f"{label} (no data)")
    axes.plot([at for at, _ in curve], [v for _, v in curve], color=color, label=label, **style)


def _draw_group(
    axes: Any, group: Group, label: str, number: int, metric: str, x: Axis
) -> list[tuple[float, Mean]]:
    """Draw the runs of a group and their mean, and give the mean; none of a single run."""
    color = f"C{number - 1}"
    counted = [one for one in group.runs if ended(one)]
    seeds = {one.config.get(SEED) for one in counted}
    curves = [curve_of(one, metric, x) for one in counted]
    means = mean_curve(curves) if len(seeds) == len(counted) > 1 else []
    thin = {"lw": 0.8, "ms": 2, "alpha": 0.5} if means else {}
    for place, one in enumerate(group.runs):
        named = label if place == 0 and not means else None
        _draw(axes, curve_of(one, metric, x), color, label=named, **thin)
    if means:
        drawn = [(at, value_or_nan(of.mean)) for at, of in means]
        _draw(axes, drawn, color, label=f"{label}: mean of {len(seeds)} seeds", lw=2)
    return means


def _draw_bands(axes: Any, bands: Sequence[Band]) -> None:
    """Shade the intervals, inside the limits that the curves have: that of two seeds is wide."""
    limits = axes.get_ylim()
    for means, color in bands:
        places, ends = [at for at, _ in means], [of.interval or (math.nan,) * 2 for _, of in means]
        low, high = [low for low, _ in ends], [high for _, high in ends]
        axes.fill_between(places, low, high, color=color, alpha=0.12, lw=0)
    axes.set_ylim(limits)
    axes.set_title(f"bands: {100 * LEVEL:g} % t-intervals of the means", fontsize=9, color="0.4")


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The name of each run, with the settings that differ where they are few."""
    _, names = split_settings([one.config for one in runs])
    if not 0 < len(names) <= MOST_SETTINGS:
        return [one.name for one in runs]
    settings = [{name: as_cell(one.config.get(name)) for name in names} for one in runs]
    return [f"{one.name} ({label_of(of, 0)})" for one, of in zip(runs, settings, strict=True)]


def unit_of(metric: str) -> str:
    """Unit of a metric for an axis label, by lbaccel's names; empty where there is none.

    >>> unit_of("val/top1_ema"), unit_of("memory/peak_gib"), unit_of("train/loss")
    (' (%)', ' (GiB)', '')
    """
    if is_in_points(metric):
        return " (%)"
    ends = {"_gib": "GiB", "_seconds": "s", "_pct": "%", "_per_second": "1/s"}
    return next((f" ({unit})" for end, unit in ends.items() if metric.endswith(end)), "")
