"""The files of an evaluation, in a folder that is replaced as a whole and holds nothing else."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError, RunFailed, way_out
from lbaccel.product.evaluation import MADE_BY, Evaluation
from lbaccel.product.judged import Judged
from lbaccel.product.pictures import draw_confusion, draw_mistakes
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.runs.folder import (
    EVALUATED,
    EVALUATIONS,
    checkpoint_name,
    strict_json,
    written_beside,
)
from lbaccel.runs.outputs import writable
from lbaccel.text import one_line

Say = Callable[[str], object]
FIGURES, TABLE, COLUMNAR = "eval.json", EVALUATED, "predictions.parquet"
CONFUSION, MISTAKES = "confusion.png", "mistakes.png"
FILES = (FIGURES, TABLE, COLUMNAR, CONFUSION, MISTAKES)


def folder_for(
    trained: TrainedModel, judged: Judged, output: str | Path | None, *, tta: str | None
) -> Path | None:
    """Where the files go: `output`, or RUN/eval/NAME; None where there is neither.

    The name tells the update, the split, and what is not as usual: the average of the weights,
    augmentation, and data that somebody named.
    """
    if output is not None:
        return Path(output)
    if trained.run is None:
        return None
    parts = [checkpoint_name(trained.update or 0), judged.split]
    parts += ["ema"] * trained.ema + [tta] * bool(tta)
    if judged.named:
        last = re.sub(r"[^A-Za-z0-9._=+-]+", "-", judged.data.rstrip("/").rpartition("/")[2])
        parts += [last.strip("-.")[:40], judged.identity["fingerprint"][:8]]
    return trained.run / EVALUATIONS / "-".join(part for part in parts if part)


def check_folder(
    folder: Path,
    *,
    files: Collection[str] = FILES,
    record: str = FIGURES,
    made_by: str = MADE_BY,
    kind: str = "evaluation",
) -> None:
    """Stop where writing there would cost anything but an earlier evaluation.

    Args:
        folder: there or not.
        files: the names of all files that such a command writes.
        record: the one of them, in JSON, whose entry `made_by` names the command.
        made_by: that entry.
        kind: of the folder's content, in words.

    Raises:
        InputError: it holds other files, or it can't be written to.
    """
    shown = one_line(str(folder))
    if not folder.exists() and not folder.is_symlink():
        writable(folder, "--output", parents=True)
        return
    if folder.is_symlink() or not folder.is_dir():
        kind = "a link" if folder.is_symlink() else "a file"
        raise InputError(f"--output {shown} is {kind}. Give a folder.")
    there = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in there if name not in files]
    if foreign or (there and not _is_own(folder, record, made_by)):
        name = one_line((foreign or there)[0])
        raise InputError(
            f"--output {shown} holds {name}, which no {kind} wrote: nothing there is replaced. "
            "Give another folder."
        )


def _is_own(folder: Path, record: str, made_by: str) -> bool:
    if not all(path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        return False
    if not (folder / record).is_file():
        return False
    try:
        content = json_in(folder / record)
    except Malformed:
        return False
    return isinstance(content, dict) and content.get("made_by") == made_by


def write_files(result: Evaluation, folder: Path, *, say: Say) -> None:
    """Write the files beside `folder`, and put them in its place when all are whole.

    Raises:
        RunFailed: the disk refuses; an earlier evaluation stays.
    """
    try:
        with written_beside(folder) as beside:
            text = strict_json(result.as_json(), indent=1)
            (beside / FIGURES).write_text(text + "\n", encoding="utf-8")
            header, rows = table_of(result)
            (beside / TABLE).write_text(as_csv(header, rows), encoding="utf-8", newline="")
            _write_parquet(beside / COLUMNAR, header, rows, say=say)
            draw_confusion(result, beside / CONFUSION)
            if not draw_mistakes(result, beside / MISTAKES):
                say(f"note: no prediction is wrong, so there is no {MISTAKES}")
    except OSError as error:
        raise RunFailed(
            f"the evaluation could not be written to {folder}: {error}. "
            f"{way_out(error, 'give another folder with --output')}"
        ) from error


def table_of(result: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of the predictions, an image a row; the most probable class first."""
    best, probabilities = result.most_probable, result.probabilities
    classes = [one_line(name) for name in result.trained.classes]
    names, labels = result.judged.names, result.judged.labels
    header = ["file", "label", "predicted", "right"]
    for place in range(1, best.shape[1] + 1):
        header += [f"class_{place}", f"probability_{place}"]
    rows = []
    for row, (name, label) in enumerate(zip(names, labels.tolist(), strict=True)):
        predicted = int(result.outputs.predicted[row])
        cells: list[Any] = [name, classes[label], classes[predicted], predicted == label]
        for output in best[row].tolist():
            cells += [classes[output], float(probabilities[row, output])]
        rows.append(cells)
    return header, rows


def as_csv(header: list[str], rows: list[list[Any]]) -> str:
    """The table as CSV: shares with six digits, truth values as 1 and 0."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([csv_cell(value) for value in row])
    return file.getvalue()


def csv_cell(value: Any) -> Any:
    """A value as it stands in a table of predictions."""
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6f}" if isinstance(value, float) else value


def _write_parquet(path: Path, header: list[str], rows: list[list[Any]], *, say: Say) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        say(f"note: pyarrow is not installed, so there is {TABLE} alone: pip install pyarrow")
        return
    filled = zip(header, zip(*rows, strict=True), strict=True)
    pq.write_table(pa.table({name: pa.array(list(column)) for name, column in filled}), path)
