"""An evaluation as text: a table a class, and its figures in sentences."""

from __future__ import annotations

from lbaccel.product.evaluation import Evaluation
from lbaccel.product.metrics import COLDEST, HOTTEST, ClassFigures, Figures
from lbaccel.runs.columns import columns
from lbaccel.text import one_line

MOST_CLASSES = 60  # in the table
WORST = 20  # of more
HEAD = ("class", "n", "recall", "95 % interval", "precision", "F1")


def report(result: Evaluation) -> str:
    """The whole text, without a line end at its end."""
    judged, trained = result.judged, result.trained
    lines = [
        f"model: {trained.described}",
        f"images: {len(judged.images):,} of {judged.description.rstrip('.')} ({judged.split})",
    ]
    if trained.num_named < len(trained.classes):
        lines.append(
            f"note: the network has {len(trained.classes)} outputs for {trained.num_named} "
            "classes; an image that it gives to one of the others is counted as wrong, as in "
            "training"
        )
    lines += ["", *_table(result.figures), "", *sentences(result)]
    return "\n".join(one_line(line) for line in lines)


def _table(figures: Figures) -> list[str]:
    rows, left = list(figures.classes), 0
    if len(rows) > MOST_CLASSES:
        rows.sort(key=lambda row: (row.recall is None, row.recall))
        left, rows = len(rows) - WORST, rows[:WORST]
    lines = columns([HEAD, *map(_cells, rows)], "lr")
    if left:
        lines.append(f"these are the {WORST} of lowest recall; eval.json has the other {left:,}")
    return lines


def _cells(row: ClassFigures) -> tuple[str, ...]:
    interval = "-" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
    return (
        one_line(row.name),
        f"{row.n:,}",
        _share(row.recall),
        interval,
        _share(row.precision),
        f"{row.f1:.3f}",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def sentences(result: Evaluation) -> list[str]:
    """The figures, a sentence a line."""
    f = result.figures
    how = ", of the mean over image and mirror image" if result.tta else ""
    lines = [
        f"top-1 is {f.top1_pct:.2f} %{how}: {f.num_right:,} of {f.n:,} images are right "
        f"(95 % interval {100 * f.low:.2f} to {100 * f.high:.2f}).",
        *([] if f.top5 is None else [f"top-5 is {100 * f.top5:.2f} %."]),
        f"Always naming the most frequent class of these images, {f.majority_class}, would give "
        f"{100 * f.majority:.2f} %.",
        f"Balanced accuracy is {100 * f.balanced_accuracy:.2f} %, macro-F1 is {f.macro_f1:.4f}, "
        f"and the loss is {f.loss:.4f}.",
        *_calibration(f),
    ]
    if result.other is not None:
        other = result.other
        lines += [
            f"A is {result.trained.path}: top-1 {f.top1_pct:.2f} %. "
            f"B is {other.trained.path}: top-1 {other.figures.top1_pct:.2f} %.",
            f"On the same {f.n:,} images {other.test} (McNemar's exact test).",
        ]
    return lines


def _calibration(f: Figures) -> list[str]:
    found = f.calibration
    if found is None:
        return []
    at = f"{found.temperature:.3g}"
    if not 1.01 * COLDEST < found.temperature < HOTTEST / 1.01:
        at += " (the end of the range that is tried: these images fix no temperature)"
    return [
        f"Calibration error is {found.error:.4f}, and {found.error_after:.4f} with a temperature: "
        "each half of the images took the one that was fitted on the other half.",
        f"The temperature of all these images is {at}; it was fitted on them.",
    ]


def below(result: Evaluation, least: float) -> str | None:
    """A sentence where top-1 is below this share, or None."""
    if result.top1 >= least:
        return None
    return f"top-1 {result.top1:.4f} is below --fail-below {least:g}"
