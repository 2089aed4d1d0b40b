"""Two runs on the same test images, where `lbaccel eval` wrote their predictions (no torch)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.documents import text_of
from lbaccel.product.shares import mcnemar
from lbaccel.runs.folder import EVALUATED, EVALUATIONS, update_of
from lbaccel.studies.one_run import CellRun

Rights = dict[str, bool]
MOST_TABLE_BYTES = 128 * 2**20  # the training set of ImageNet has 80 MB


def on_the_same_images(one: Sequence[CellRun], other: Sequence[CellRun]) -> list[dict[str, Any]]:
    """McNemar's exact test of each seed whose two runs were evaluated on the same images.

    It says how surely the two networks of one seed differ on these images; it does not say what
    another seed would give, so no verdict takes it.

    Args:
        one, other: the runs of two places.
    """
    others = {run.cell.seed: run for run in other}
    found = []
    for run in one:
        against = others.get(run.cell.seed)
        if run.folder is None or against is None or against.folder is None:
            continue
        both = _both(run.folder, against.folder)
        if both is not None:
            import numpy as np

            ours, theirs = (np.array(list(of.values()), dtype=bool) for of in both)
            test = mcnemar(theirs, ours)
            found.append(
                {
                    "seed": run.cell.seed,
                    "num_images": len(ours),
                    "only_one": test.only_second,
                    "only_other": test.only_first,
                    "p": test.p,
                }
            )
    return found


def _both(one: Path, other: Path) -> tuple[Rights, Rights] | None:
    """Which images each has right, of the newest evaluation of one kind that both have."""
    ours, theirs = _tables(one), _tables(other)
    for kind in sorted(ours.keys() & theirs.keys(), key=lambda kind: (len(kind), kind)):
        first, second = _rights(ours[kind]), _rights(theirs[kind])
        if first and second and list(first) == list(second):
            return first, second
    return None


def _tables(run: Path) -> dict[str, Path]:
    """Kind of evaluation to its table: "val" in `update_000040-val`; of the latest update."""
    found: dict[str, tuple[int, Path]] = {}
    for path in run.glob(f"{EVALUATIONS}/*/{EVALUATED}"):
        name, _, kind = path.parent.name.partition("-")
        update = update_of(Path(name))
        if update is not None and update >= found.get(kind, (-1, path))[0]:
            found[kind] = (update, path)
    return {kind: path for kind, (_, path) in found.items()}


def _rights(path: Path) -> Rights:
    """Image to whether it is right; {} where it is too large, damaged, or names one twice."""
    try:
        text = io.StringIO(text_of(path, most=MOST_TABLE_BYTES), newline="")
        rows = [(row["file"], row["right"]) for row in csv.DictReader(text)]
    except (OSError, ValueError, LookupError, csv.Error):
        return {}
    found = {name: right == "1" for name, right in rows}
    return found if len(found) == len(rows) else {}
