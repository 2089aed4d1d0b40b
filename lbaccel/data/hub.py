"""Images of a data set on the Hugging Face hub, through `datasets`: its map-style ones."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from PIL import Image

from lbaccel.data.images import ImageFiles, decode_image
from lbaccel.data.opening import Opening, Sets, divided, some
from lbaccel.errors import InputError, RunFailed
from lbaccel.text import one_line, without_tokens

MOST_BYTES = 256 * 2**20  # of an image that a row names by its path

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`


def open_hf(name: str, wanted: Opening) -> Sets:
    """The images of a data set: its splits train, validation and test, or the one split named.

    Args:
        name: OWNER/NAME, or OWNER/NAME:SPLIT, whose images are then divided into training and
            validation; a folder takes the place of OWNER/NAME.
        wanted: how they are to be split and read.

    Raises:
        InputError: `datasets` is not installed, there is no such data set, split or column, or a
            label is missing.
        RunFailed: the hub can't be reached.
    """
    path, _, split = name.partition(":")
    if not path:
        raise InputError("data='hf:' names no data set. Use hf:OWNER/NAME or hf:OWNER/NAME:SPLIT.")
    found = _load(path, split or None)
    tables = found if isinstance(found, Mapping) else {"train": found}
    chosen = {
        part: tables[next(n for n in names if n in tables)]
        for part, names in SPLITS.items()
        if any(n in tables for n in names)
    }
    if "train" not in chosen:
        raise InputError(
            f"hf:{name} has no split 'train': it has {some(tables)}. Name one, such as "
            f"hf:{path}:{next(iter(tables), 'train')}."
        )
    image, label = _columns(chosen["train"], name)
    classes = _classes(chosen["train"], label)
    parts: dict[str, ImageFiles] = {}
    note = ""
    for part, table in chosen.items():
        try:
            parts[part] = _files(table, f"hf:{name}, {part}", image, label, classes, wanted)
        except InputError:
            if part != "test":
                raise
            note = "; its test images are not used: they lack images or labels of these classes"
    sets = divided(parts, wanted, hashed="row number")
    return sets._replace(how=sets.how + note)


def _load(path: str, split: str | None) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise InputError(
            f"hf:{path} needs the package datasets: pip install 'lbaccel[hf]', or download the "
            "parquet files and use parquet:PATH."
        ) from error
    folder = Path(path).expanduser()
    try:
        if folder.is_dir() and any((folder / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(folder))
            return found if split is None else found[split]
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, split=split)
    except Exception as error:  # of the hub, of the network, of a file's format
        reason = one_line(without_tokens(" ".join(str(error).split()), get_token()))[:300]
        text = f"hf:{path} can't be had: {reason.rstrip('.') or type(error).__name__}."
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise RunFailed(
                f"{text} Without a network, use parquet:PATH with a copy of its files."
            ) from error
        raise InputError(f"{text} Use hf:OWNER/NAME as it stands on the hub.") from error


def _columns(table: Any, name: str) -> tuple[str, str]:
    """The image and the label column: by their features; of several, by their names."""
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    plain = ("label", "fine_label")
    labels = labels or [column for column in plain if kinds.get(column) == "Value"]
    chosen = []
    for columns, preferred, rule in (
        (images, ("image", "img"), "one column of images"),
        (labels, plain, "one label column, of classes or called label"),
    ):
        best = columns if len(columns) == 1 else [c for c in preferred if c in columns]
        if not best:
            listed = ", ".join(f"{one_line(column)} ({kind})" for column, kind in kinds.items())
            raise InputError(f"hf:{name} needs {rule}; it has {len(columns)} among: {listed}.")
        chosen.append(best[0])
    return chosen[0], chosen[1]


def _classes(table: Any, label: str) -> tuple[Any, ...]:
    """The names of the classes, or the values that stand for them, in order."""
    names = getattr(table.features[label], "names", None)
    if names:
        return tuple(map(str, names))
    return tuple(sorted({value for value in _labels(table, label) if value is not None}))


def _labels(table: Any, label: str) -> list[Any]:
    return list(table.select_columns([label])[:][label])


def _files(
    table: Any, where: str, image: str, label: str, classes: Sequence[Any], wanted: Opening
) -> ImageFiles:
    for column in (image, label):
        if column not in table.features:
            raise InputError(f"{where}: there is no column {column!r}, which training has.")
    values: list[Any] = _labels(table, label)
    if not getattr(table.features[label], "names", None):
        number = {value: index for index, value in enumerate(classes)}
        values = [number.get(value) for value in values]
    for row, value in enumerate(values):
        if value is None or not 0 <= value < len(classes):
            raise InputError(
                f"{where}, row {row} (counted from 0) has no label among the {len(classes)} "
                "classes: take it out of the data set."
            )
    read = HubImages(_undecoded(table, image), image, where, wanted.exif_orientation)
    rows = tuple(range(len(values)))
    return ImageFiles(rows, tuple(values), tuple(map(str, classes)), tuple(map(str, rows)), read)


def _undecoded(table: Any, image: str) -> Any:
    """The table with this column alone, as bytes: `decode_image` is what reads images here."""
    import datasets  # pyright: ignore[reportMissingImports]  # an extra

    return table.select_columns([image]).cast_column(image, datasets.Image(decode=False))


@dataclass(frozen=True, eq=False)
class HubImages:
    """The image in a row of a table of `datasets`, which workers open by its files."""

    table: Any
    column: str
    where: str
    exif_orientation: bool = True

    def name_of(self, row: int) -> str:
        """The row."""
        return f"row {row}"

    def data_of(self, row: int) -> bytes:
        """The bytes of the image of this row; none where there is no image."""
        found = self.table[row][self.column] or {}
        if not found.get("bytes") and found.get("path"):
            path = Path(found["path"])
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                rule = f"its path names no file of at most {MOST_BYTES >> 20} MiB"
                raise OSError(errno.EINVAL, rule)
            return path.read_bytes()
        return found.get("bytes") or b""

    def __call__(self, row: int) -> Image.Image:
        """The image of this row, as RGB.

        Raises:
            InputError: there is none, or its bytes are no image.
        """
        where = f"{self.where}, row {row} (counted from 0)"
        try:
            data = self.data_of(row)
        except OSError as error:
            raise InputError(f"{where}: its file can't be read: {error.strerror}.") from error
        if not data:
            raise InputError(f"{where} has no image: take it out of the data set.")
        return decode_image(BytesIO(data), where, exif_orientation=self.exif_orientation)
