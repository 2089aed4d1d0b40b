"""A chart: its values, and what the script redraws it from (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lbaccel.report.scales import Kind, Scale, scale_of
from lbaccel.runs.thin import rounded

Numbers = Sequence[float | int | None]
Style = Literal["thin", "thick", "dash", "points", "seeds", "line-points", "hollow", "reference"]
NUM_COLORS = 8


@dataclass(frozen=True)
class Stroke:
    """A curve, or a row of points.

    Args:
        name: of it, for the reader.
        x: values on each axis that it may be drawn over.
        y: as many; None is a gap.
        color: a number; after eight colours they come again, dashed.
        style: how it is drawn.
        low, high: ends of an interval at each point.
        label: a short name at its end; empty is none.
        listed: whether the legend names it.
    """

    name: str
    x: Mapping[str, Numbers]
    y: Numbers
    color: int = 0
    style: Style = "thick"
    low: Numbers | None = None
    high: Numbers | None = None
    label: str = ""
    listed: bool = True


@dataclass(frozen=True)
class Landmark:
    """A place on the x-axes, or (`y`) a height, with a word."""

    text: str
    x: Mapping[str, float | int | None] = field(default_factory=dict)
    y: float | None = None
    low: float | None = None  # of a band along the x-axis
    high: float | None = None
    color: int | None = None  # as of a line; None is grey


@dataclass(frozen=True)
class Chart:
    """Lines over one or several x-axes.

    Args:
        key: of the chart; a word, of which the page has one.
        title, alt: a heading, and the chart in words.
        x_labels: axis to its label with unit.
        y_label: with unit.
        lines: drawn in this order.
        x_kind, y_kind: scales at first.
        most: a linear y-axis ends there where no value is above it.
        marks: beside the lines.
        head, rows: of the table behind it, as text.
        note: a sentence below it.
    """

    key: str
    title: str
    alt: str
    x_labels: Mapping[str, str]
    y_label: str
    lines: Sequence[Stroke]
    x_kind: Kind = "linear"
    y_kind: Kind = "linear"
    most: float | None = None
    marks: Sequence[Landmark] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""

    @property
    def axis(self) -> str:
        """The x-axis that it has at first."""
        return next(iter(self.x_labels))


def scales(chart: Chart) -> tuple[Scale, Scale]:
    """Both axes as they are at first."""
    at = chart.axis
    xs: list[float] = []
    ys: list[float] = [mark.y for mark in chart.marks if mark.y is not None]
    for line in chart.lines:
        for x, y in zip(line.x.get(at, ()), line.y, strict=False):
            if x is not None and y is not None:
                xs.append(x)
                ys.append(y)
        ys += [v for side in (line.low, line.high) for v in side or () if v is not None]
    xs += [v for mark in chart.marks if mark.y is None and (v := mark.x.get(at)) is not None]
    return scale_of(xs, chart.x_kind), scale_of(ys, chart.y_kind, most=chart.most)


def spec(chart: Chart) -> dict[str, Any]:
    """For the script: the values, and the axes as they are drawn."""
    x, y = scales(chart)
    lines = []
    for line in chart.lines:
        one: dict[str, Any] = {
            "n": line.name,
            "c": line.color,
            "x": {axis: list(values) for axis, values in line.x.items()},
            "y": list(line.y),
        }
        if line.low is not None and line.high is not None:
            one |= {"lo": list(line.low), "hi": list(line.high)}
        if line.label:
            one["label"] = line.label
        lines.append(one)
    return {
        "axes": dict(chart.x_labels),
        "at": chart.axis,
        "most": chart.most,
        "x": _axis(x),
        "y": _axis(y),
        "lines": lines,
        "marks": [{"n": m.text, "x": dict(m.x), "y": m.y, "c": m.color} for m in chart.marks],
    }


def _axis(scale: Scale) -> dict[str, Any]:
    return {"kind": scale.kind, "low": scale.low, "high": scale.high}


def legend(chart: Chart) -> list[dict[str, Any]]:
    """The named lines once each, for the words above a chart."""
    return [
        {
            "name": line.name,
            "color": line.color % NUM_COLORS,
            "dash": line.color // NUM_COLORS,
            "style": line.style,
        }
        for line in chart.lines
        if line.style != "thin" and line.listed
    ]


def table_of_points(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """A row a point, for a chart of few points."""
    head = ["line", chart.x_labels[chart.axis], chart.y_label]
    with_ends = any(line.low is not None for line in chart.lines)
    rows = []
    for line in chart.lines:
        places = line.x.get(chart.axis, ())
        lows, highs = line.low or [None] * len(places), line.high or [None] * len(places)
        for x, y, low, high in zip(places, line.y, lows, highs, strict=False):
            row = [line.name, _cell(x), _cell(y)]
            rows.append([*row, _cell(low), _cell(high)] if with_ends else row)
    return [*head, "low", "high"] if with_ends else head, rows


def _cell(value: float | int | None) -> str:
    shown = rounded(value)
    return "-" if shown is None else f"{shown:,}"
