"""A chart: its values, its static drawing, and what the script redraws it from (no torch).

The plot is an SVG that is stretched to the page's width, in units of a thousandth of its sides.
Ticks and labels are text beside it, so that they keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from lbaccel.report.scales import Kind, Scale, scale_of
from lbaccel.report.thin import rounded

Numbers = Sequence[float | int | None]
Style = Literal["thin", "thick", "dash", "points", "seeds", "line-points", "hollow", "reference"]
UNITS = 1000  # of the plot, along each side
HEIGHT = 250  # of the plot, in pixels
NUM_COLORS = 8
_LINE_HEIGHT = 14  # of a label, in pixels
MOST_LABELS = 9
_FLIPS = 700  # units: the word of a mark beyond stands on its left
_MARK_ROWS = 4  # heights at which the words of marks stand
_WITH_DOTS = ("points", "seeds", "line-points", "hollow")


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
        switch: whether the reader may choose another axis.
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
    switch: bool = False

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
            "k": line.style,
            "x": {axis: list(values) for axis, values in line.x.items()},
            "y": list(line.y),
        }
        if line.low is not None and line.high is not None:
            one |= {"lo": list(line.low), "hi": list(line.high)}
        if line.label:
            one["label"] = line.label
        lines.append(one)
    return {
        "title": chart.title,
        "axes": dict(chart.x_labels),
        "at": chart.axis,
        "yLabel": chart.y_label,
        "most": chart.most,
        "x": _axis(x),
        "y": _axis(y),
        "lines": lines,
        "marks": [{"n": m.text, "x": dict(m.x), "y": m.y, "c": m.color} for m in chart.marks],
        "switch": chart.switch,
    }


def _axis(scale: Scale) -> dict[str, Any]:
    return {"kind": scale.kind, "low": scale.low, "high": scale.high}


def view(chart: Chart) -> dict[str, Any]:
    """For the template: paths, ticks and labels of the static drawing."""
    x, y = scales(chart)
    labels = _labels(chart, x, y)
    longest = max((len(label["text"]) for label in labels), default=0)
    return {
        "chart": chart,
        "key": chart.key,
        "height": HEIGHT,
        "side": min(150, 12 + 7.5 * longest) if longest else 12,
        "xticks": [{"at": _percent(x.place(v)), "text": text} for v, text in x.ticks()],
        "yticks": [{"at": _percent(1 - y.place(v)), "text": text} for v, text in y.ticks()],
        "grid": "".join(f"M0 {_units(1 - y.place(v))}H{UNITS}" for v, _ in y.ticks()),
        "lines": [_drawn(line, chart.axis, x, y) for line in chart.lines],
        "marks": [_mark(mark, n, chart.axis, x, y) for n, mark in enumerate(chart.marks)],
        "labels": labels,
        "low": chart.most is not None,  # of rising curves: words of marks stand below them
    }


def _drawn(line: Stroke, axis: str, x: Scale, y: Scale) -> dict[str, Any]:
    places = line.x.get(axis, ())
    return {
        "name": line.name,
        "color": line.color % NUM_COLORS,
        "dash": line.color // NUM_COLORS,
        "style": line.style,
        "d": "" if line.style in ("points", "seeds", "hollow") else _path(places, line.y, x, y),
        "dots": _dots(places, line.y, x, y) if _has_dots(line) else "",
        "band": _band(line, places, x, y),
        "whiskers": _whiskers(line, places, x, y),
    }


def _has_dots(line: Stroke) -> bool:
    return line.style in _WITH_DOTS


def _points(xs: Numbers, ys: Numbers, x: Scale, y: Scale) -> list[tuple[int, int] | None]:
    """In units of the plot; None is a gap. A point without a place on the x-axis is none at all."""
    found: list[tuple[int, int] | None] = []
    for at, value in zip(xs, ys, strict=False):
        if at is None:
            continue
        if value is None:
            found.append(None)
            continue
        across, up = x.place(at), y.place(value)
        bad = math.isnan(across) or math.isnan(up)
        found.append(None if bad else (_units(across), _units(1 - up)))
    return found


def _path(xs: Numbers, ys: Numbers, x: Scale, y: Scale) -> str:
    parts: list[str] = []
    pen = "M"
    for point in _points(xs, ys, x, y):
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]} {point[1]}")
        pen = "L"
    return "".join(parts)


def _dots(xs: Numbers, ys: Numbers, x: Scale, y: Scale) -> str:
    """Strokes of no length: with round ends each is a dot that no stretching deforms."""
    return "".join(f"M{p[0]} {p[1]}h0" for p in _points(xs, ys, x, y) if p is not None)


def _band(line: Stroke, xs: Numbers, x: Scale, y: Scale) -> str:
    if line.low is None or line.high is None or _has_dots(line):
        return ""
    lower = [p for p in _points(xs, line.low, x, y) if p is not None]
    upper = [p for p in _points(xs, line.high, x, y) if p is not None]
    around = [*upper, *reversed(lower)]
    return f"M{'L'.join(f'{a} {b}' for a, b in around)}Z" if len(around) > 2 else ""


def _whiskers(line: Stroke, xs: Numbers, x: Scale, y: Scale) -> str:
    if line.low is None or line.high is None or not _has_dots(line):
        return ""
    pairs = zip(_points(xs, line.low, x, y), _points(xs, line.high, x, y), strict=False)
    return "".join(f"M{a[0]} {a[1]}V{b[1]}" for a, b in pairs if a and b)


def _mark(mark: Landmark, number: int, axis: str, x: Scale, y: Scale) -> dict[str, Any]:
    if mark.y is not None:
        up = _units(1 - y.place(mark.y))
        return {
            "text": mark.text,
            "d": f"M0 {up}H{UNITS}",
            "top": up / 10,
            "left": None,
            "color": "",
        }
    place = mark.x.get(axis)
    if place is None:
        return {"text": "", "d": "", "top": None, "left": None, "color": ""}
    across = _units(x.place(place))
    box = ""
    if mark.low is not None and mark.high is not None:
        left, right = (
            min(max(x.place(v), 0.0), 1.0) if v > 0 or x.kind == "linear" else 0.0
            for v in (mark.low, mark.high)
        )
        box = f"M{_units(left)} 0H{_units(right)}V{UNITS}H{_units(left)}Z"
    return {
        "text": mark.text,
        "d": f"M{across} 0V{UNITS}",
        "left": across / 10,
        "top": None,
        "box": box,
        "flip": across > _FLIPS,
        "row": number % _MARK_ROWS,
        "color": "" if mark.color is None else mark.color % NUM_COLORS,
    }


def _labels(chart: Chart, x: Scale, y: Scale) -> list[dict[str, Any]]:
    """Names at the ends of lines, moved apart where they overlap; none where they are many."""
    found: list[dict[str, Any]] = []
    for line in chart.lines:
        points = [p for p in _points(line.x.get(chart.axis, ()), line.y, x, y) if p is not None]
        if line.label and points:
            found.append({"text": line.label, "color": line.color % NUM_COLORS, "y": points[-1][1]})
    if len(found) > MOST_LABELS:
        return []
    apart = _LINE_HEIGHT * UNITS / HEIGHT
    found.sort(key=lambda label: label["y"])
    for above, below in pairwise(found):
        below["y"] = max(below["y"], above["y"] + apart)
    end = float(UNITS)
    for label in reversed(found):
        label["y"] = min(label["y"], end)
        end = label["y"] - apart
    for label in found:
        label["at"] = _percent(label["y"] / UNITS)
    return found


def _units(share: float) -> int:
    return math.floor(share * UNITS + 0.5)  # as JavaScript's Math.round


def _percent(share: float) -> float:
    return math.floor(share * 1000 + 0.5) / 10


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
