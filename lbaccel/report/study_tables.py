"""The tables of a study's page, out of the JSON of its results (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lbaccel.report.verdict import ends, in_unit, number
from lbaccel.runs.compare_figure import unit_of
from lbaccel.studies.judging import signed

Result = Mapping[str, Any]


def _titles(result: Result) -> dict[str, str]:
    return {arm["name"]: arm.get("title") or arm["name"] for arm in result["arms"]}


def results(result: Result) -> dict[str, Any]:
    """A row an arm and batch size, the source's own number beside it."""
    metric, rows = result["metric"], result["table"]
    unit, titles = unit_of(metric), _titles(result)
    with_source = any(row.get("expected") is not None for row in rows)
    with_rate = any(row.get("lr") is not None for row in rows)
    head = ["arm", "batch", "updates", "lr", "seeds", "diverged", f"{metric}{unit}"]
    head += ["95 % over seeds", "95 % over images (Wilson)"]
    head += ["source", "less the source"] if with_source else []
    if not with_rate:
        head.remove("lr")
    body = []
    for row in rows:
        cells = [titles.get(row["arm"], row["arm"]), f"{row['batch']:,}", _whole(row["updates"])]
        cells += [_rate(row.get("lr"))] if with_rate else []
        cells += [_seeds(row), f"{row['diverged']}" if row.get("diverged") else "-"]
        cells += [number(row["mean"], metric), ends(row.get("low"), row.get("high"), metric=metric)]
        wilson = row.get("wilson") or (None, None)
        cells.append(ends(wilson[0], wilson[1], metric=metric))
        if with_source:
            expected, mean = row.get("expected"), row["mean"]
            cells.append(number(expected, metric))
            gap = None if expected is None or mean is None else mean - expected
            cells.append("-" if gap is None else signed(gap, metric))
        body.append(cells)
    return {"head": head, "rows": body}


def _seeds(row: Mapping[str, Any]) -> str:
    missing = row.get("missing")
    return f"{row['n']} ({missing} missing)" if missing else f"{row['n']}"


def _whole(value: Any) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _rate(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def comparisons(result: Result) -> dict[str, Any] | None:
    """Each comparison with its interval and its differences by seed."""
    found, titles, metric = result.get("comparisons") or [], _titles(result), result["metric"]
    if not found:
        return None
    body = []
    for one in found:
        against = f"{titles.get(one['against_arm'], one['against_arm'])}, {one['against_batch']:,}"
        gap = one.get("difference")
        each = ", ".join(
            f"{seed}: {signed(value, metric)}" for seed, value in one["per_seed"].items()
        )
        body.append(
            [
                f"{titles.get(one['arm'], one['arm'])}, {one['batch']:,}",
                against,
                str(one["n"]),
                "-" if gap is None else signed(gap, metric),
                ends(one.get("low"), one.get("high"), metric=metric, signed=True),
                one["verdict"],
                each or "-",
            ]
        )
    head = ["arm, batch", "against", "pairs", "difference", "95 % interval, paired", "verdict"]
    head.append("by seed")
    if any(one.get("on_images") for one in found):
        head.append("on the same test images (McNemar)")
        for row, one in zip(body, found, strict=True):
            row.append("; ".join(map(_on_images, one.get("on_images") or ())) or "-")
    return {"head": head, "rows": body, "words": [1, 5, 6, 7]}


def _on_images(test: Mapping[str, Any]) -> str:
    return (
        f"seed {test['seed']}: right alone on {test['only_one']} and {test['only_other']} of "
        f"{test['num_images']:,}, p = {test['p']:.2g}"
    )


def aggregates(result: Result) -> dict[str, Any] | None:
    """Interquartile means over batch sizes and seeds."""
    metric, titles = result["metric"], _titles(result)
    known = [one for one in result.get("aggregates") or () if one["value"] is not None]
    if not known:
        return None
    body = [
        [
            titles.get(one["arm"], one["arm"]),
            f"{one['num_runs']}",
            number(one["value"], metric),
            ends(one["low"], one["high"], metric=metric),
        ]
        for one in known
    ]
    head = ["arm", "runs", f"interquartile mean{unit_of(metric)}", "95 % interval (bootstrap)"]
    return {"head": head, "rows": body}


def limits(result: Result) -> dict[str, Any] | None:
    """The scaling limits of each arm."""
    found, titles = result.get("scaling_limits") or [], _titles(result)
    if not found:
        return None
    body = [
        [
            titles.get(one["arm"], one["arm"]),
            f"{one['points']:g}",
            _whole(one.get("batch")),
            "-" if one.get("factor") is None else f"{one['factor']:g} x",
            one["sentence"],
        ]
        for one in found
    ]
    head = ["arm", "points lost at most", "largest batch", "of the baseline's", "in words"]
    return {"head": head, "rows": body, "words": [4]}


def noise_scale(result: Result) -> dict[str, Any] | None:
    """The last reading of the noise scale, the median over the runs of each arm and batch size."""
    titles = _titles(result)
    last: dict[tuple[str, int], list[list[float]]] = {}
    for run in result["runs"]:
        if run.get("noise") and run["noise"][-1][2] is not None:
            ends = [math.inf if v is None else v for v in run["noise"][-1][2:]]
            last.setdefault((run["arm"], run["batch"]), []).append(ends)
    if not last:
        return None
    body = []
    for (arm, batch), of in last.items():
        found = [median(values) for values in zip(*of, strict=True)]
        cells = [f"{v:,.0f}" if math.isfinite(v) else "unbounded" for v in found]
        body.append([titles.get(arm, arm), f"{batch:,}", str(len(of)), *cells])
    head = ["arm", "batch", "runs", "critical batch S / |G|²", "low", "high"]
    return {"head": head, "rows": body}


def gaps(result: Result) -> dict[str, Any]:
    """Training less validation of each row of the results."""
    metric, titles = result["metric"], _titles(result)
    body = []
    for row in result["table"]:
        train, test = row.get("train_mean"), row["mean"]
        gap = None if train is None or test is None else train - test
        body.append(
            [
                titles.get(row["arm"], row["arm"]),
                f"{row['batch']:,}",
                number(train, metric),
                number(test, metric),
                "-" if gap is None else signed(gap, metric),
            ]
        )
    unit = unit_of(metric)
    head = ["arm", "batch", f"training{unit}", f"validation{unit}", "training less validation"]
    return {"head": head, "rows": body}


def tuning(result: Result) -> dict[str, Any] | None:
    """The choices of the grid."""
    found, titles = result.get("tuning") or [], _titles(result)
    if not found:
        return None
    body = []
    for one in found:
        tried = ", ".join(
            f"{_rate(value)}: {'-' if got is None else in_unit(got, result['metric'])}"
            for value, got in zip(one["values"], one["results"], strict=True)
        )
        edge = "at the edge of its grid" if one.get("at_edge") else ""
        body.append(
            [
                titles.get(one["arm"], one["arm"]),
                _whole(one["batch"]),
                one["setting"],
                _rate(one["best"]),
                tried,
                edge,
            ]
        )
    head = ["arm", "batch", "setting", "best", "each value with its result", "warning"]
    return {"head": head, "rows": body, "words": [2, 4, 5]}


def run_table(result: Result, prefix: str) -> dict[str, Any]:
    """A row a run, with what it cost."""
    metric, titles = result["metric"], _titles(result)
    with_target = bool(result.get("target"))
    head = ["run", "arm", "batch", "seed", "status", f"{metric}{unit_of(metric)}", "updates"]
    head += ["samples", "minutes", "peak GiB", "predicted GiB"]
    head += ["updates to target", "hours to target"] if with_target else []
    body = []
    for run in result["runs"]:
        cells = [
            run["cell"],
            titles.get(run["arm"], run["arm"]),
            f"{run['batch']:,}",
            str(run["seed"]),
        ]
        cells += [run["status"], number(run.get("value"), metric), _whole(run.get("num_updates"))]
        seconds = run.get("seconds")
        cells += [_whole(run.get("samples")), "-" if seconds is None else f"{seconds / 60:.1f}"]
        cells += [_gib(run.get("peak_gib")), _gib(run.get("predicted_gib"))]
        if with_target:
            reached = run.get("reached")
            hours = None if not reached else reached.get("hours")
            cells.append(_whole(reached["updates"]) if reached else "not reached" if run.get(
                "censored") else "-")  # fmt: skip
            cells.append("-" if hours is None else f"{hours:.3f}")
        body.append(cells)
    links = [f"{prefix}-run-{n}" for n in range(1, len(body) + 1)]
    return {"head": head, "rows": body, "links": links, "words": [1, 4]}


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
