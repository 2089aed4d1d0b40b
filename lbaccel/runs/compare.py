"""Runs side by side, on the axis that is fair to batch sizes: samples (no torch)."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from lbaccel.errors import InputError
from lbaccel.runs.columns import columns, markdown_columns
from lbaccel.runs.outputs import Own, ends_of
from lbaccel.runs.read import Point, Run, Series
from lbaccel.text import printable

Axis = Literal["samples", "updates", "hours"]
Cell = str | int | float | bool | None
AXIS_LABELS: dict[Axis, str] = {
    "samples": "samples seen (images)",
    "updates": "updates (optimizer steps)",
    "hours": "training time (hours)",
}
# How a number of a column is printed; what is not listed is a setting, printed as it was given.
FORMATS = {
    "updates": ",d",
    "samples": ",d",
    "seconds": ",.1f",
    "peak_gib": ".2f",
    "samples_to_target": ",d",
    "seconds_to_target": ",.1f",
    "delta": "+.4g",
    "seeds": ",d",
    "mean": ".5g",
    "half_width": ".3g",
}
_RESULTS = ("name", "status", "best", "last", "group", "each")  # columns that are no settings


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, later ones of the same name with ` (2)`, ` (3)` added."""
    seen: Counter[str] = Counter()
    named: list[Run] = []
    for one in runs:
        seen[one.name] += 1
        suffix = f" ({seen[one.name]})" if seen[one.name] > 1 else ""
        named.append(replace(one, name=one.name + suffix))
    return named


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss by its name.

    >>> lower_is_better("val/loss"), lower_is_better("val/top1")
    (True, False)
    """
    return "loss" in metric.rsplit("/", 1)[-1]


def is_in_points(metric: str) -> bool:
    """Whether a metric is a share of right images in %, so that its differences are points.

    >>> is_in_points("val/top1"), is_in_points("val/top5_ema"), is_in_points("val/loss")
    (True, True, False)
    """
    return "top" in metric.rsplit("/", 1)[-1]


def best_point(series: Series, metric: str) -> Point | None:
    """The first of the best finite points: the lowest of a loss, the highest of anything else."""
    finite = [(point.value, point) for point in series if point.value is not None]
    choose = min if lower_is_better(metric) else max
    return choose(finite, key=lambda pair: pair[0])[1] if finite else None


class Valued(Protocol):
    """A measured value, with whatever is known of it; None is not finite."""

    @property
    def value(self) -> float | None:
        """The value itself."""


Found = TypeVar("Found", bound=Valued)


def first_reaching(series: Sequence[Found], metric: str, *, target: float) -> Found | None:
    """The first point at least as good as `target`: <= for a loss, >= for anything else."""
    sign = -1 if lower_is_better(metric) else 1
    reached = (p for p in series if p.value is not None and sign * p.value >= sign * target)
    return next(reached, None)


def split_settings(configs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Settings equal in all runs, and the names of those that differ or are missing in some.

    >>> split_settings([{"seed": 0, "lr": 0.1}, {"seed": 0, "lr": 0.2, "ema": True}])
    ({'seed': 0}, ['lr', 'ema'])
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    first = configs[0]
    equal = [k for k in keys if all(k in one and one[k] == first.get(k) for one in configs)]
    return {key: first[key] for key in equal}, [key for key in keys if key not in equal]


def table(
    runs: Sequence[Run], metric: str, *, x: Axis = "samples", target: float | None = None
) -> list[dict[str, Cell]]:
    """One row a run; every row has the same columns, None is missing.

    Columns: name, the settings that differ, `status` where a run did not end, `best` and where on
    the x-axis, `last`, updates, samples, seconds, peak_gib, `samples_to_target` and
    `seconds_to_target` with a target, and `delta`: best minus the best of the first run.

    Raises:
        InputError: no run has the metric.
    """
    check_metric(runs, metric)
    configs = [one.config for one in runs]
    _, differing = split_settings(configs)
    unfinished = any(one.summary.get("status") not in (None, "done") for one in runs)
    first = best_point(runs[0].history.get(metric, ()), metric)
    reference = None if first is None else first.value
    rows: list[dict[str, Cell]] = []
    for one, config in zip(runs, configs, strict=True):
        series = one.history.get(metric, ())
        best = best_point(series, metric)
        row: dict[str, Cell] = {"name": one.name}
        row |= columns_of({key: as_cell(config.get(key)) for key in differing})
        if unfinished:
            row["status"] = as_cell(one.summary.get("status"))
        row["best"] = value = None if best is None else best.value
        row[f"best_at_{x}"] = None if best is None else axis_value(best, x)
        row["last"] = None if not series else value_or_nan(series[-1].value)
        row |= totals(one)
        if target is not None:
            reached = first_reaching(series, metric, target=target)
            row["samples_to_target"] = reached and reached.samples_seen
            row["seconds_to_target"] = reached and _seconds(reached)
        if value is not None and reference is not None and one is not runs[0]:
            row["delta"] = value - reference
        else:
            row["delta"] = None
        rows.append(row)
    return rows


def columns_of(settings: Mapping[str, Cell]) -> dict[str, Cell]:
    """Settings as columns: one that is named as a result is `config/name`.

    >>> columns_of({"lr": 0.1, "seconds": 60})
    {'lr': 0.1, 'config/seconds': 60}
    """
    return {f"config/{k}" if k in (*_RESULTS, *FORMATS) else k: v for k, v in settings.items()}


def check_metric(runs: Sequence[Run], metric: str) -> None:
    """Stop where no run has logged a metric.

    Raises:
        InputError: with the metrics that there are.
    """
    available = sorted({name for one in runs for name in one.history})
    if metric not in available:
        raise InputError(
            f"--metric {metric}: none of the {len(runs)} runs has logged it. "
            f"Use one of: {', '.join(available) or '(nothing was logged)'}"
        )


def axis_value(point: Point, x: Axis) -> float | None:
    """Where a point stands on an axis; None where the run did not log it."""
    return {"samples": point.samples_seen, "updates": point.update, "hours": point.hours}[x]


def totals(one: Run) -> dict[str, Cell]:
    """Size of the run, out of its summary; out of its history where it has none (a crash)."""
    points = [point for series in one.history.values() for point in series]
    peaks = [point.value for point in one.history.get("memory/peak_gib", ())]
    logged: dict[str, list[Any]] = {
        "num_updates": [point.update for point in points],
        "samples_seen": [point.samples_seen for point in points],
        "seconds": [_seconds(point) for point in points],
        "peak_gib": peaks,
    }
    total = {key: one.summary.get(key) for key in logged}
    for key, values in logged.items():
        if total[key] is None:
            total[key] = max((value for value in values if value is not None), default=None)
    return {key.removeprefix("num_").removesuffix("_seen"): as_cell(total[key]) for key in total}


def _seconds(point: Point) -> float | None:
    return None if point.hours is None else point.hours * 3600


def value_or_nan(value: float | None) -> float:
    """NaN for what was logged and was not finite: a diverged run must not look like a gap."""
    return float("nan") if value is None else value


def as_cell(value: Any) -> Cell:
    """A setting as a cell: JSON where it is a list."""
    return value if isinstance(value, Cell) else json.dumps(value, default=str)


def formatted(column: str, value: Cell) -> str:
    """Text of one cell; what is missing is `-`, never 0.

    >>> formatted("samples", 1234567), formatted("best", 2 / 3), formatted("peak_gib", None)
    ('1,234,567', '0.66667', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, (str, bool)):
        return str(value)
    if column.startswith("best_at_"):
        return f"{value:,.3f}" if isinstance(value, float) else f"{value:,d}"
    of_a_setting = ".10g" if isinstance(value, float) else ""
    spec = FORMATS.get(column, ".5g" if column in ("best", "last") else of_a_setting)
    try:
        return format(round(value) if spec == ",d" else value, spec)
    except (OverflowError, ValueError):  # of an edited summary: infinite, or above all floats
        return str(value)


def cells_of(rows: Sequence[Mapping[str, Cell]], metric: str) -> list[list[str]]:
    """Header and cells as text; `best` becomes `best val/top1`."""
    titles = {
        "best": f"best {metric}",
        "last": f"last {metric}",
        "mean": f"mean best {metric}",
        "half_width": "± 95 %",
        "each": "best by seed",
    }
    header = [titles.get(column, column) for column in rows[0]]
    return [header, *([formatted(key, value) for key, value in row.items()] for row in rows)]


def aligned(rows: Sequence[Mapping[str, Cell]], metric: str) -> str:
    """The table as text: names to the left, all other columns to the right."""
    return "\n".join(columns(cells_of(rows, metric), "lr"))


def markdown(rows: Sequence[Mapping[str, Cell]], metric: str) -> str:
    """The table in Markdown."""
    return markdown_columns(cells_of(rows, metric))


def as_csv(rows: Sequence[Mapping[str, Cell]]) -> str:
    """The table as CSV: numbers in full, missing values empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _is_table(path: Path) -> bool:
    first = ends_of(path)[0].partition(b"\n")[0]
    return first.startswith(b"name,") and b",best,best_at_" in first


TABLE_FILE = Own("table of lbaccel compare", _is_table)


def settings_line(equal: Mapping[str, Any], num_runs: int, *, others: int = 0) -> str:
    """The settings that all runs share, once, wrapped at 100 columns; `others` are not listed."""
    listed = ", ".join(f"{key}={value}" for key, value in equal.items()) or "no setting"
    title = "settings" if num_runs == 1 else f"same in all {num_runs} runs"
    defaults = "1 setting at its default" if others == 1 else f"{others} settings at their defaults"
    more = f"; {defaults}" if others else ""
    return textwrap.fill(printable(f"{title}: {listed}{more}"), 100, subsequent_indent="  ") + "\n"
