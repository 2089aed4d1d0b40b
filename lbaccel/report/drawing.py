"""The static drawing of a chart, for the template; `script.js` has the same once more (no torch).

The plot is an SVG that is stretched to the page's width, in units of a thousandth of its sides.
Ticks and labels are text beside it, so that they keep their size on a phone.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from lbaccel.report.chart import NUM_COLORS, Chart, Landmark, Numbers, Stroke, scales
from lbaccel.report.scales import Scale

UNITS = 1000  # of the plot, along each side
HEIGHT = 250  # of the plot, in pixels
_LINE_HEIGHT = 14  # of a label, in pixels
MOST_LABELS = 9
_FLIPS = 700  # units: the word of a mark beyond stands on its left
_MARK_ROWS = 4  # heights at which the words of marks stand
_WITH_DOTS = ("points", "seeds", "line-points", "hollow")


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
