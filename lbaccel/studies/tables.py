"""A study's result as text, Markdown and CSV, in the layout of published tables (no torch)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbaccel.recipe.values import shown
from lbaccel.runs.columns import columns, markdown_columns
from lbaccel.runs.compare import Cell, is_in_points
from lbaccel.runs.compare import as_csv as rows_as_csv
from lbaccel.runs.outputs import Own, ends_of
from lbaccel.studies.judging import number, signed
from lbaccel.text import in_markdown, printable

Result = Mapping[str, Any]
Grid = list[list[str]]
WIDTH = 100
_NONE = "-"
_CSV_START = "arm,batch,n,diverged,missing,mean"


def as_text(result: Result) -> str:
    """Verdict and tables, aligned for a terminal."""
    parts = ["\n".join(_wrapped(line) for line in result["verdict"])]
    for title, grid, note in _tables(result):
        parts.append("\n".join([f"{printable(title)}:", *columns(grid, "lr"), *_noted(note)]))
    if result["settings"]:
        parts.append(_wrapped(f"equal in all runs: {_settings(result['settings'])}"))
    parts += [_wrapped(f"warning: {one}") for one in result["warnings"]]
    return "\n\n".join(parts) + "\n"


def as_markdown(result: Result) -> str:
    """The same in Markdown, without a heading."""
    parts = ["\n".join(f"- {in_markdown(line)}" for line in result["verdict"])]
    for title, grid, note in _tables(result):
        parts += [f"**{in_markdown(title)}**", markdown_columns(grid)]
        parts += [in_markdown(note)] if note else []
    if result["settings"]:
        parts.append(f"Equal in all runs: {in_markdown(_settings(result['settings']))}.")
    if result["warnings"]:
        parts.append("\n".join(f"- warning: {in_markdown(one)}" for one in result["warnings"]))
    return "\n\n".join(parts) + "\n"


def as_csv(result: Result) -> str:
    """The table as CSV: an arm at a batch size a row, with its difference from the baseline."""
    base = (result["baseline"]["arm"], result["baseline"]["batch"])
    judged = {
        (one["arm"], one["batch"]): one
        for one in result["comparisons"]
        if (one["against_arm"], one["against_batch"]) == base
    }
    rows: list[dict[str, Cell]] = []
    for row in result["table"]:
        low, high = row["wilson"] or (None, None)
        one = judged.get((row["arm"], row["batch"]), {})
        cells = {k: v for k, v in row.items() if k not in ("wilson", "each")}
        cells |= {"image_low": low, "image_high": high}
        cells |= {f"{key}_from_baseline": one.get(key) for key in ("difference", "low", "high")}
        cells["verdict"] = one.get("verdict")
        cells |= {f"seed_{seed}": row["each"].get(str(seed)) for seed in result["seeds"]}
        rows.append(cells)
    return rows_as_csv(rows)


def _is_table(path: Path) -> bool:
    return ends_of(path)[0].startswith(_CSV_START.encode())


TABLE_FILE = Own("table of lbaccel study report", _is_table)


def _tables(result: Result) -> list[tuple[str, Grid, str]]:
    """Title, cells and a note of each table that has rows."""
    found = [_results(result), _comparisons(result), _on_images(result), _to_target(result)]
    found += [_aggregates(result), _tuning(result), _arms(result)]
    return [one for one in found if len(one[1]) > 1]


def _results(result: Result) -> tuple[str, Grid, str]:
    """Arms in rows, batch sizes in columns; under each accuracy the number of the source."""
    cells = {(row["arm"], row["batch"]): row for row in result["table"]}
    grid: Grid = [["batch", *(f"{batch:,}" for batch in result["batches"])]]
    for arm in result["arms"]:
        rows = [cells.get((arm["name"], batch)) for batch in result["batches"]]
        grid.append([arm["title"], *(_accuracy(row, result) for row in rows)])
        if any(row is not None and row["expected"] is not None for row in rows):
            grid.append(["  in the source", *(_expected(row) for row in rows)])
    note = (
        f"± is the half-width of Student's {100 * result['level']:g} % interval over seeds; in "
        "brackets the updates of a run."
    )
    return f"{result['metric']}, median of the last {result['last']} evaluations", grid, note


def _accuracy(row: Mapping[str, Any] | None, result: Result) -> str:
    if row is None:
        return ""
    total = row["n"] + row["diverged"] + row["missing"]
    text = _NONE
    if row["mean"] is not None:
        text = number(row["mean"], result["metric"])
        if row["half_width"] is not None:
            text += f" ± {number(row['half_width'], result['metric'])}"
    if row["updates"] is not None:
        text += f" ({row['updates']:,.0f})"
    text += f", {row['diverged']} of {total} diverged" if row["diverged"] else ""
    return text + (f", {row['missing']} of {total} missing" if row["missing"] else "")


def _expected(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else _NONE if row["expected"] is None else f"{row['expected']:.2f}"


def _comparisons(result: Result) -> tuple[str, Grid, str]:
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    unit = " (points)" if is_in_points(result["metric"]) else ""
    grid: Grid = [
        ["compared", "against", f"difference{unit}", "low", "high", "seeds", "verdict"],
    ]
    for one in result["comparisons"]:
        numbers = [signed(one[key], result["metric"]) for key in ("difference", "low", "high")]
        places = [
            f"{titles[one[arm]]} at {one[batch]:,}"
            for arm, batch in (("arm", "batch"), ("against_arm", "against_batch"))
        ]
        grid.append([*places, *numbers, str(one["n"]), one["verdict"]])
    return "comparisons, paired by seed", grid, ""


def _on_images(result: Result) -> tuple[str, Grid, str]:
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    grid: Grid = [["A", "B", "seed", "images", "A alone is right", "B alone is right", "p"]]
    for one in result["comparisons"]:
        for test in one["on_images"]:
            grid.append(
                [
                    f"{titles[one['arm']]} at {one['batch']:,}",
                    f"{titles[one['against_arm']]} at {one['against_batch']:,}",
                    str(test["seed"]),
                    *(f"{test[key]:,}" for key in ("num_images", "only_one", "only_other")),
                    f"{test['p']:.2g}",
                ]
            )
    note = (
        "Over test images alone: how surely two networks differ on these images. It does not say "
        "what another seed would give, so no verdict takes it."
    )
    return "the same test images (McNemar's exact test)", grid, note


def _to_target(result: Result) -> tuple[str, Grid, str]:
    if result["target"] is None:
        return "", [], ""
    title = f"updates to {result['target']['metric']} of {result['target']['value']:g}"
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    grid: Grid = [["batch", *(f"{batch:,}" for batch in result["batches"])]]
    for arm in result["to_target"]:
        points = {point["batch"]: point for point in arm["points"]}
        cells = [_updates(points.get(batch)) for batch in result["batches"]]
        grid.append([titles[arm["arm"]], *cells])
    return title, grid, "Means over seeds; a run that never met the target is censored."


def _updates(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return _NONE
    if point["mean"] is not None:
        return f"{point['mean']:,.1f}".removesuffix(".0")
    met = [f"{one:,}" for one in point["updates"] if one is not None]
    return f"{', '.join(met)}{', ' if met else ''}{point['censored']} censored"


def _aggregates(result: Result) -> tuple[str, Grid, str]:
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    grid: Grid = [["arm", "interquartile mean", "low", "high", "runs"]]
    for one in result["aggregates"]:
        ends = [_NONE if one[k] is None else f"{one[k]:.2f}" for k in ("low", "high")]
        grid.append([titles[one["arm"]], f"{one['value']:.2f}", *ends, str(one["num_runs"])])
    sizes = next((one["batches"] for one in result["aggregates"]), [])
    note = f"Over batch {', '.join(f'{size:,}' for size in sizes)}; bootstrap over seeds."
    return "arms as a whole", grid, note


def _tuning(result: Result) -> tuple[str, Grid, str]:
    grid: Grid = [["tuned", "setting", "grid", "results", "best"]]
    for one in result["tuning"]:
        results = [number(value, result["metric"]) for value in one["results"]]
        best = _NONE if one["best"] is None else f"{one['best']:g}"
        grid.append(
            [
                f"{one['arm']} at {one['batch']:,}",
                one["setting"],
                " ".join(f"{value:g}" for value in one["values"]),
                " ".join(results),
                best + (" (edge)" if one.get("at_edge") else ""),
            ]
        )
    return "tuning on a held-out part of the training set", grid, ""


def _arms(result: Result) -> tuple[str, Grid, str]:
    """The settings in which arms differ."""
    names = list(dict.fromkeys(name for arm in result["arms"] for name in arm["settings"]))
    if not names:
        return "", [], ""
    grid: Grid = [["setting", *(arm["title"] for arm in result["arms"])]]
    for name in names:
        grid.append([name, *(_setting(arm["settings"].get(name)) for arm in result["arms"])])
    return "settings that differ", grid, ""


def _setting(value: Any) -> str:
    return _NONE if value is None else shown(value) or "none"


def _settings(settings: Mapping[str, Any]) -> str:
    from lbaccel.recipe.experiment import beside_defaults

    told = beside_defaults(settings)
    others = len(settings) - len(told)
    rest = f"; {others} settings at their defaults" if others else ""
    return ", ".join(f"{name}={value}" for name, value in told.items()) + rest


def _wrapped(text: str) -> str:
    return textwrap.fill(printable(text), WIDTH, subsequent_indent="  ")


def _noted(note: str) -> list[str]:
    return [_wrapped(note)] if note else []
