"""The page as one text: parts, charts, their data as JSON, style and script (no torch)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbaccel.report.chart import Chart, legend, spec
from lbaccel.report.drawing import view
from lbaccel.runs.folder import strict_json
from lbaccel.runs.outputs import Own, ends_of
from lbaccel.text import printable

HERE = Path(__file__).parent
MOST_BYTES = 2_000_000  # of the whole file
CURVES = "curves"  # name of the block of JSON that the script reads
_GENERATOR = b'<meta name="generator" content="lbaccel report">'


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Args:
        content: for the template; charts stand in it as `Chart`.
        data: what stands in the page as JSON.
        charts: all that stand in it.
    """

    content: Mapping[str, Any]
    data: Mapping[str, Any]
    charts: Sequence[Chart]


def _is_report(path: Path) -> bool:
    return _GENERATOR in ends_of(path)[0]


REPORT = Own("report of lbaccel", _is_report)


def page(parts: Sequence[Part]) -> str:
    """The whole HTML file: everything is inside, and every text from outside is escaped."""
    import jinja2

    from lbaccel import __version__

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
    )
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    charts = {chart.key: spec(chart) for part in parts for chart in part.charts}
    names = [part.data.get("kind", "comparison") for part in parts]
    blocks = {
        f"{name}-data-{n}" if names.count(name) > 1 else name: json_block(part.data)
        for n, (name, part) in enumerate(zip(names, parts, strict=True), 1)
    }
    whole = _prepared(dict(parts[0].content)) if len(parts) == 1 else {}
    return environment.get_template("page.html.j2").render(
        title=whole.get("title", f"{len(parts)} parts"),
        about=whole.get("about", ""),
        parts=[_prepared(dict(part.content)) for part in parts],
        blocks={**blocks, CURVES: json_block(charts, indent=None)},
        style=_inline((HERE / "style.css").read_text(encoding="utf-8")),
        script=_inline(script),
        script_hash=f"sha256-{digest}",
        version=__version__,
    )


def _inline(text: str) -> Any:
    """A file of ours, which is no text from outside."""
    import markupsafe

    return markupsafe.Markup(text)


def json_block(value: Any, indent: int | None = 1) -> Any:
    """JSON that no HTML parser reads as anything else: other signs than plain ones are escapes.

    >>> print(json_block({"name": "</script>é"}, indent=None))
    {"name": "\\u003c/script\\u003e\\u00e9"}
    """
    import markupsafe

    text = strict_json(value, indent=indent)
    return markupsafe.Markup(re.sub(r"[^\n !#-;=?-~\"]|[&]", _escape, text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


def _prepared(value: Any) -> Any:
    """The content for the template: charts as drawings, text without orders to a terminal."""
    if isinstance(value, Chart):
        drawing = view(value)
        return _prepared(
            {k: v for k, v in drawing.items() if k != "chart"}
            | {"chart": {k: getattr(value, k) for k in _OF_CHART}}
        )
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        found = {printable(str(k)): _prepared(v) for k, v in value.items()}
        charts = value.get("charts")
        if charts and "legend" not in value and isinstance(charts[0], Chart):
            found["legend"] = _prepared(common_legend(charts))
        for name, chart in value.items():
            if isinstance(chart, Chart):
                found[f"{name}_legend"] = _prepared(legend(chart))
        return found
    if isinstance(value, (list, tuple)):
        return [_prepared(item) for item in value]
    return value


_OF_CHART = ("title", "alt", "x_labels", "y_label", "head", "rows", "note", "axis")


def common_legend(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """The named lines of several charts, each once."""
    found: dict[str, dict[str, Any]] = {}
    for chart in charts:
        for entry in legend(chart):
            found.setdefault(entry["name"], entry)
    return list(found.values())
