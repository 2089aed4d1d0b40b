"""The part of a page on a study, out of the JSON of its results (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.report import study_charts as charts_of
from lbaccel.report.curves import POINTS
from lbaccel.report.page import Part
from lbaccel.report.pictures import PictureRoom
from lbaccel.report.provenance import entries, shared_and_own
from lbaccel.report.verdict import ends, in_unit, number
from lbaccel.runs.compare_figure import unit_of
from lbaccel.studies.judging import signed
from lbaccel.text import without_tokens

Result = Mapping[str, Any]


def of_study(
    result: Result,
    folder: Path,
    *,
    number: int = 1,
    room: PictureRoom | None = None,
    points: int = POINTS,
) -> Part:
    """The part on a study.

    Args:
        result: as `study_result` gives it.
        folder: of the study, in which its figures lie.
        number: of the part in the page.
        room: the bytes that pictures may take.
        points: how many the curves may have together.
    """
    prefix = f"study-{number}"
    updates = charts_of.updates_to_target(result, f"{prefix}-updates")
    error = charts_of.value_by_batch(result, f"{prefix}-value")
    gaps = charts_of.train_beside_test(result, f"{prefix}-gap")
    curves = charts_of.curves_of_arms(result, prefix, points)
    runs = result["runs"]
    shared, own = shared_and_own([entries(run.get("provenance") or {}) for run in runs])
    content: dict[str, Any] = {
        "kind": "study",
        "prefix": prefix,
        "title": result["title"],
        "about": _about(result),
        "question": result.get("question"),
        "source": _source(result.get("source")),
        "study_note": result.get("note"),
        "verdict": _verdict(result),
        "rule": _rule(result),
        "warnings": result.get("warnings") or [],
        "lost": _lost(runs),
        "updates": updates,
        "to_target": [one["sentence"] for one in result.get("to_target") or []],
        "error": error,
        "table": _table(result),
        "aggregates": _aggregates(result),
        "comparisons": _comparisons(result),
        "limits": _limits(result),
        "gaps": gaps,
        "gap_table": _gap_table(result) if gaps else None,
        "arms": [
            {"title": title, "charts": views, "open": place == 0}
            for place, (title, views) in enumerate(curves)
        ],
        "tuning": _tuning(result),
        "figures": _figures(result, folder, room or PictureRoom()),
        "settings": dict(result.get("settings") or {}),
        "run_table": _runs(result, prefix),
        "shared": list(shared.items()),
        "runs": [
            {
                "name": run["cell"],
                "entries": list(mine.items()),
                "reproduce": without_tokens((run.get("provenance") or {}).get("reproduce") or ""),
                "status": run["status"],
                "reason": "; ".join(event["text"] for event in run.get("events") or ()),
            }
            for run, mine in zip(runs, own, strict=True)
        ],
    }
    drawn = [*filter(None, [updates, error]), *gaps, *(c for _, views in curves for c in views)]
    return Part(content, _without_curves(result), drawn)


def _without_curves(result: Result) -> dict[str, Any]:
    """The result without what the charts hold: histories of many runs pass the page's bound."""
    left_out = ("history", "noise")
    runs = [{k: v for k, v in run.items() if k not in left_out} for run in result["runs"]]
    return {**result, "runs": runs}


def _about(result: Result) -> str:
    arms, batches, seeds = result["arms"], result["batches"], result["seeds"]
    counts = [(len(arms), "arm"), (len(batches), "batch size"), (len(seeds), "seed")]
    said = " x ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts)
    scale = f", scale {result['scale']}" if result.get("scale") else ""
    return f"Study {result['name']}{scale}: {said}, {len(result['runs'])} runs."


def _source(source: Mapping[str, Any] | None) -> str | None:
    if not source:
        return None
    year = f" ({source['year']})" if source.get("year") else ""
    where = f", {source['where']}" if source.get("where") else ""
    return f"{source['authors']}{year}: {source['title']}{where}"


def _rule(result: Result) -> str:
    level = 100 * float(result.get("level", 0.95))
    return (
        f"The value of a run is the median of its last {result['last']} evaluations of "
        f"{result['metric']}, never its best. Intervals over seeds are Student's at {level:g} %, "
        "and a difference is taken seed by seed. Wilson's interval is over the test images, and "
        "is another thing."
    )


def _verdict(result: Result) -> list[str]:
    """The sentences that stand at no other place of the page."""
    below = {one["sentence"] for one in result.get("to_target") or ()}
    said = [line for line in result["verdict"] if line not in below]
    return said or ["No run of this study has come to its end."]


def _lost(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on runs that diverged, failed, are missing, or did not reach the target."""
    found = []
    for status, words in (
        ("diverged", "diverged and count as such"),
        ("failed", "failed"),
        ("running", "still go on"),
        ("missing", "are missing"),
    ):
        names = [run["cell"] for run in runs if run["status"] == status]
        if names:
            found.append(f"{len(names)} of {len(runs)} runs {words}: {_some(names)}.")
    censored = [run["cell"] for run in runs if run.get("censored")]
    if censored:
        found.append(
            f"{len(censored)} of {len(runs)} runs ended without reaching the target (censored): "
            f"{_some(censored)}."
        )
    return found


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _titles(result: Result) -> dict[str, str]:
    return {arm["name"]: arm.get("title") or arm["name"] for arm in result["arms"]}


def _table(result: Result) -> dict[str, Any]:
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


def _comparisons(result: Result) -> dict[str, Any] | None:
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


def _aggregates(result: Result) -> dict[str, Any] | None:
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


def _limits(result: Result) -> dict[str, Any] | None:
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


def _gap_table(result: Result) -> dict[str, Any]:
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


def _tuning(result: Result) -> dict[str, Any] | None:
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
    edges = [row for row, one in zip(body, found, strict=True) if one.get("at_edge")]
    warning = ""
    if edges:
        places = _some([f"{row[0]} at {row[1]}" for row in edges])
        warning = (
            f"{len(edges)} of {len(body)} best values lie at the edge of their grid, so a better "
            f"one may lie beyond it: {places}."
        )
    head = ["arm", "batch", "setting", "best", "each value with its result", "warning"]
    return {"head": head, "rows": body, "words": [2, 4, 5], "warning": warning}


def _figures(result: Result, folder: Path, room: PictureRoom) -> list[dict[str, Any]]:
    found = []
    for one in result.get("figures") or ():
        path = (folder / str(one["file"])).resolve()
        inside = path.is_relative_to(folder.resolve())
        source, note = room.embedded(path) if inside else (None, "lies outside the study's folder.")
        found.append({"name": one["name"], "alt": one["alt"], "source": source, "note": note})
    return found


def _runs(result: Result, prefix: str) -> dict[str, Any]:
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
