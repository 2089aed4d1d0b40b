"""The newest evaluation of a run, as `lbaccel eval` wrote it: figures, confusion, mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.documents import Malformed, json_in
from lbaccel.product.evaluation import MADE_BY
from lbaccel.product.files import EVALUATIONS, FIGURES, MISTAKES
from lbaccel.report.pictures import PictureRoom

MOST_CLASSES = 20  # of a matrix with a number in each cell
MOST_PAIRS = 20
MOST_ROWS = 200  # of the table of classes


def evaluations_in(run: Path) -> list[Path]:
    """Folders of evaluations in a run folder, the newest first."""
    found = [path.parent for path in run.glob(f"{EVALUATIONS}/*/{FIGURES}")]
    return sorted(found, key=lambda path: (-(path / FIGURES).stat().st_mtime, path.name))


def judged(run: Path, room: PictureRoom) -> dict[str, Any] | None:
    """The newest evaluation as the page shows it; None where there is none.

    One that can't be read, or that another program wrote, is a sentence under `note`.
    """
    folders = evaluations_in(run)
    if not folders:
        return None
    folder = folders[0]
    others = [path.name for path in folders[1:]]
    try:
        content = json_in(folder / FIGURES)
        if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
            raise Malformed(ValueError(f"not made by {MADE_BY}"))
        found = _content(content)
    except (Malformed, LookupError, TypeError, ValueError) as error:
        note = f"{EVALUATIONS}/{folder.name}/{FIGURES} can't be used: {error}"
        return {"name": folder.name, "note": note, "others": others}
    found |= {"name": folder.name, "others": others, "note": ""}
    sheet = folder / MISTAKES
    if sheet.is_file():
        found["mistakes"], found["note"] = room.embedded(sheet)
        found["alt"] = f"The most confident mistakes: {found['worst']}"
    return found


def _content(figures: Mapping[str, Any]) -> dict[str, Any]:
    names = [str(name) for name in figures["outputs"]]
    triples = [(int(a), int(b), int(n)) for a, b, n in figures["confusion"]]
    wrong = sorted((t for t in triples if t[0] != t[1]), key=lambda t: -t[2])
    pairs = [
        {"is": names[a], "said": names[b], "count": n, "share": _of_class(triples, a, n)}
        for a, b, n in wrong[:MOST_PAIRS]
    ]
    low, high = 100 * float(figures["low"]), 100 * float(figures["high"])
    right = f"{int(figures['num_right']):,} of {int(figures['n']):,}"
    data, weights = figures["data"], figures["weights"]
    return {
        "sentence": f"Top-1 is {float(figures['top1_pct']):.2f} %: {right} images are right "
        f"({low:.2f} to {high:.2f}; Wilson's interval at 95 %, over images and not over seeds).",
        "about": f"Weights after update {weights['update']}, "
        f"{'averaged, ' if weights['ema'] else ''}on {data['description']} ({data['split']}).",
        "matrix": matrix(names, triples) if len(names) <= MOST_CLASSES else None,
        "pairs": pairs,
        "num_wrong_pairs": len(wrong),
        "classes": [_of_one(one) for one in figures["classes"][:MOST_ROWS]],
        "num_classes": len(figures["classes"]),
        "worst": "; ".join(f"{p['is']} as {p['said']} ({p['count']})" for p in pairs[:3]) or "none",
    }


def _of_class(triples: Sequence[tuple[int, int, int]], row: int, count: int) -> float:
    return 100 * count / max(1, sum(n for a, _, n in triples if a == row))


def matrix(names: Sequence[str], triples: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Counts and shares of a confusion matrix: a row a class of the images.

    >>> matrix(["a", "b"], [(0, 0, 3), (0, 1, 1)])["rows"][0]["cells"]
    [{'count': 3, 'share': 0.75}, {'count': 1, 'share': 0.25}]
    """
    counts = {(a, b): n for a, b, n in triples}
    rows = []
    for a, name in enumerate(names):
        of = [counts.get((a, b), 0) for b in range(len(names))]
        whole = max(1, sum(of))
        rows.append({"name": name, "cells": [{"count": n, "share": n / whole} for n in of]})
    return {"names": list(names), "rows": rows}


def _of_one(one: Mapping[str, Any]) -> dict[str, str]:
    def share(name: str) -> str:
        return "-" if one.get(name) is None else f"{100 * float(one[name]):.1f}"

    ends = "-" if one.get("low") is None else f"{share('low')} to {share('high')}"
    return {
        "name": str(one["name"]),
        "n": f"{int(one['n']):,}",
        "recall": share("recall"),
        "interval": ends,
        "precision": share("precision"),
    }
