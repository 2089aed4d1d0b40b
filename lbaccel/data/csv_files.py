"""Image files that a table lists: a CSV file with the columns path, label and, if wanted, split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.names import Names
from lbaccel.data.opening import Opening, Sets, divided, some
from lbaccel.documents import Malformed, text_of
from lbaccel.errors import InputError
from lbaccel.text import one_line

MOST_BYTES = 256 * 2**20  # of the table
MOST_ROWS = 10_000_000
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class Listed(NamedTuple):
    """A line of the table."""

    path: str
    label: str
    split: str


def open_csv(path: Path, wanted: Opening) -> Sets:
    """The images that a CSV file lists, a row each below a line of column names.

    `path` is a file, relative to the folder of the table; `label` is the name of its class; `split`
    is train, val or test. Without the column `split`, or without val in it, a share of the training
    images is held out. Classes are sorted by name.

    Raises:
        InputError: no such file, a column or a value is missing, a split of another name, a
            validation image whose class training lacks, or a table out of bounds.
    """
    if not path.is_file():
        raise InputError(
            f"csv:{path} is {'a folder' if path.exists() else 'absent'}: give a CSV file with the "
            "columns path and label."
        )
    of_split: dict[str, list[Listed]] = {}
    for row in _rows(path):
        of_split.setdefault(row.split, []).append(row)
    if "train" not in of_split:
        raise InputError(
            f"csv:{path} lists no training image: its column split needs rows with 'train', or "
            "leave the column out."
        )
    classes = tuple(sorted({row.label for row in of_split["train"]}))
    number = {name: label for label, name in enumerate(classes)}
    read = partial(read_image, exif_orientation=wanted.exif_orientation, root=str(path.parent))
    found, note = {}, ""
    for split, rows in of_split.items():
        if strange := sorted({row.label for row in rows} - set(classes)):
            if split == "test":  # training looks at none of them
                note = f"; its test images are not used: training has no class {some(strange)}"
                continue
            raise InputError(
                f"csv:{path}: validation has class {some(strange)}, of which training has no "
                "image. Both need the same classes."
            )
        names = Names(row.path for row in rows)
        labels = tuple(number[row.label] for row in rows)
        found[split] = ImageFiles(names, labels, classes, names, read)
    sets = divided(found, wanted, hashed="path")
    return sets._replace(how=sets.how + note)


def _rows(path: Path) -> Iterator[Listed]:
    try:
        text = text_of(path, most=MOST_BYTES).removeprefix("\ufeff")  # as spreadsheets write it
    except Malformed as error:
        raise InputError(f"csv:{path} is no UTF-8: {error}. Save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        for name in ("path", "label"):
            if columns.count(name) != 1:
                raise InputError(
                    f"csv:{path} needs one column {name!r} in its first line; it has "
                    f"{some(columns) or 'none'}. Write path,label or path,label,split there."
                )
        at = {name: columns.index(name) for name in ("path", "label", "split") if name in columns}
        for count, cells in enumerate(reader):
            if count >= MOST_ROWS:
                raise InputError(f"csv:{path} has more than {MOST_ROWS:,} rows. Cut it in parts.")
            if cells:
                yield _row(cells, at, f"csv:{path}, line {reader.line_num}")
    except csv.Error as error:
        where = f"csv:{path}, line {reader.line_num}"
        raise InputError(f"{where} can't be read: {error}. Save the table again.") from error


def _row(cells: list[str], at: dict[str, int], where: str) -> Listed:
    found = {name: cells[i].strip() if i < len(cells) else "" for name, i in at.items()}
    for name, value in found.items():
        if not value:
            raise InputError(f"{where} has no {name}: give it one, or take the line out.")
    split = found.get("split", "train")
    if split.lower() not in SPLITS:
        raise InputError(f"{where} has the split '{one_line(split[:50])}'. Use train, val or test.")
    return Listed(found["path"], found["label"], SPLITS[split.lower()])
