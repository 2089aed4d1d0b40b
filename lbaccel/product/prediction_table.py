"""Predictions as CSV: a line a file, each name on one line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lbaccel.product.files import csv_cell
from lbaccel.product.prediction import Prediction
from lbaccel.runs.outputs import Own, ends_of
from lbaccel.text import one_line

_START = ["file", "class_1", "probability_1"]
UNSURE, ERROR = "unsure", "error"


def _is_table(path: Path) -> bool:
    return ends_of(path)[0].startswith(",".join(_START).encode())


PREDICTIONS = Own("table of lbaccel predict", _is_table)


def header(*, topk: int, threshold: bool) -> str:
    """The line of the names of the columns.

    >>> header(topk=2, threshold=True)
    'file,class_1,probability_1,class_2,probability_2,unsure,error\\n'
    """
    names = ["file"]
    for place in range(1, topk + 1):
        names += [f"class_{place}", f"probability_{place}"]
    return _line([*names, *([UNSURE] if threshold else []), ERROR])


def row(prediction: Prediction, *, topk: int, threshold: bool) -> str:
    """The line of one file; without a prediction its cells are empty.

    >>> row(Prediction("a.png", ("cat",), (0.75,)), topk=1, threshold=False)
    'a.png,cat,0.750000,\\n'
    """
    cells: list[object] = [one_line(prediction.file)]
    for place in range(topk):
        there = place < len(prediction.classes)
        cells.append(one_line(prediction.classes[place]) if there else "")
        cells.append(csv_cell(prediction.probabilities[place]) if there else "")
    if threshold:
        cells.append("" if prediction.unsure is None else int(prediction.unsure))
    return _line([*cells, prediction.error])


def _line(cells: list[object] | list[str]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()
