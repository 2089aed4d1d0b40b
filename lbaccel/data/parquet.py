"""Images in parquet files, as the Hugging Face hub keeps them: a struct {bytes, path}, a label."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.names import Names
from lbaccel.data.opening import AS_TEST, AS_UNUSED, AS_VAL, Opening, Sets, some
from lbaccel.data.parquet_bounds import batches, check_rows
from lbaccel.data.parquet_columns import Columns, find_columns, other_columns
from lbaccel.data.row_images import ROW_RULE, RowImages, decode_rows, opened
from lbaccel.data.split import SPLIT, split_by_hash
from lbaccel.data.subset import noted, part
from lbaccel.errors import CannotRead, InputError

VAL_NAMES, TEST = ("validation", "val"), "test"


class Table(NamedTuple):
    """The files of one split, and what is kept in memory of each of their rows."""

    images: RowImages
    labels: NDArray[np.int64]
    paths: list[str | None]


def open_parquet(root: Path, wanted: Opening) -> Sets:
    """The images of train-*.parquet, validation-*.parquet and test-*.parquet.

    Without the second a share of the first is held out; the third is then the validation set only
    if `wanted.test_split` says so. Images of one size of at most 64 pixels a side are decoded into
    memory. All others stay in the
    files: reading one decompresses its row group, of which each process keeps the last 256 MiB.

    Raises:
        InputError: the folder, a column or a label is missing, or a file or an image is broken.
    """
    files = find_files(root, test_split=wanted.test_split)
    columns = find_columns(_schema(files.train[0]), files.train[0])
    train = _read_table(files.train, columns, wanted)
    classes, labels = _train_labels(train, columns)
    if files.val:
        how = f"validation from {files.val_name}-*.parquet"
        val = _read_table(files.val, columns, wanted)
        val_labels = _other_labels(val, columns, classes=classes, train_labels=labels)
        rows, val_rows = np.arange(len(labels)), np.arange(len(val_labels))
    else:
        named = None not in train.paths and len(set(train.paths)) == len(labels)
        how = f"{SPLIT} of the {'file name' if named else 'row number'}"
        halves = split_by_hash(
            _keys(train),
            labels.tolist(),
            classes=classes,
            val_fraction=wanted.val_fraction,
            seed=wanted.seed,
        )
        val, val_labels = train, labels
        rows, val_rows = (np.array(half) for half in halves)

    rows, of_rows = _drawn(train, rows, labels, wanted.max_train_samples, "max_train_samples")
    val_rows, of_val_rows = _drawn(
        val, val_rows, val_labels, wanted.max_val_samples, "max_val_samples"
    )
    how += noted(of_rows, of_val_rows)
    pixels = decode_rows(train.images, rows)
    val_pixels = None if pixels is None else decode_rows(val.images, val_rows)
    if pixels is None or val_pixels is None or pixels.shape[1:] != val_pixels.shape[1:]:
        of_train = _image_files(train, rows, labels, classes)
        of_val: ImageArray | ImageFiles = _image_files(val, val_rows, val_labels, classes)
    else:
        of_train = ImageArray(pixels, torch.from_numpy(labels[rows]), classes)
        of_val = ImageArray(val_pixels, torch.from_numpy(val_labels[val_rows]), classes)
    test, note = _test_set(files.test, columns, wanted, of_train, labels)
    return Sets(of_train, of_val, how + note, test)


def _drawn(
    table: Table, rows: NDArray[np.int64], labels: NDArray[np.int64], most: int | None, name: str
) -> tuple[NDArray[np.int64], str]:
    """The rows that are wanted, before any image is decoded."""

    def names() -> list[str]:
        keys = _keys(table)
        return [keys[row] for row in rows]

    kept, told = part(labels[rows].tolist(), most, names=names, name=name)
    return rows[kept], told


def _are_named(table: Table) -> bool:
    """Whether each row has a path of its own."""
    return None not in table.paths and len(set(table.paths)) == len(table.labels)


def _keys(table: Table) -> list[str]:
    """Names that no two rows share: the files' own, or else the numbers of the rows."""
    named = _are_named(table)
    return [str(path if named else row) for row, path in enumerate(table.paths)]


def _test_set(
    files: list[Path],
    columns: Columns,
    wanted: Opening,
    train: ImageArray | ImageFiles,
    train_labels: NDArray[np.int64],
) -> tuple[ImageArray | ImageFiles | None, str]:
    """The images of test-*.parquet, or why they are none (the hub's often lack their labels).

    Training looks at none of them, so whatever is wrong with them is no reason to stop it.
    """
    if not files:
        return None, ""
    classes = train.classes
    try:
        table = _read_table(files, columns, wanted)
        labels = _other_labels(table, columns, classes=classes, train_labels=train_labels)
        rows = np.arange(len(labels))
        wanted_now = isinstance(train, ImageArray) and wanted.decodes_test
        pixels = decode_rows(table.images, rows) if wanted_now else None
    except CannotRead:
        raise
    except InputError as error:
        return None, f"; test-*.parquet is not used: {str(error).rstrip('.')}"
    if pixels is None or pixels.shape[1:] != train.images.shape[1:]:  # type: ignore[union-attr]
        return _image_files(table, rows, labels, classes), ""
    return ImageArray(pixels, torch.from_numpy(labels), classes), ""


class Files(NamedTuple):
    """The files of each set, and the word that those of the validation set begin with."""

    train: list[Path]
    val: list[Path]
    val_name: str
    test: list[Path]


def find_files(root: Path, *, test_split: str = AS_TEST) -> Files:
    """The files in `root` or `root`/data.

    Args:
        root: a folder.
        test_split: see `Opening`.

    Raises:
        InputError: `root` is no folder, or holds no file named train-*.parquet.
    """
    if not root.is_dir():
        raise InputError(
            f"parquet:{root} is {'a file' if root.is_file() else 'absent'}: give the folder that "
            f"holds train-*.parquet, such as parquet:{root.parent if root.is_file() else 'PATH'}."
        )
    for folder in (root, root / "data"):
        if train := _shards(folder, "train"):
            if test_split == AS_UNUSED:
                return Files(train, [], "", [])
            found = ((_shards(folder, name), name) for name in VAL_NAMES)
            val, name = next(((files, name) for files, name in found if files), ([], ""))
            test = _shards(folder, TEST)
            if test and not val and test_split == AS_VAL:
                return Files(train, test, TEST, [])
            return Files(train, val, name, test)
    names = sorted(path.name for path in root.rglob("*.parquet"))
    raise InputError(
        f"parquet:{root} holds no train-*.parquet, nor does its folder data: found "
        f"{', '.join(names[:5]) or 'no parquet file'}{', ...' * (len(names) > 5)}. Name the files "
        "as the Hugging Face hub does: train-00000-of-00001.parquet, test-00000-of-00001.parquet."
    )


def _shards(folder: Path, name: str) -> list[Path]:
    return sorted([*folder.glob(f"{name}-*.parquet"), *folder.glob(f"{name}.parquet")])


def _schema(path: Path) -> pa.Schema:
    with opened(path) as file:
        return file.schema_arrow


def _read_table(files: list[Path], columns: Columns, wanted: Opening) -> Table:
    """Where each row lies, its label and its path; of the images not a byte."""
    labels: list[NDArray[np.int64]] = []
    paths: list[str | None] = []
    groups: list[tuple[int, int, int, int]] = []
    for number, path in enumerate(files):
        with opened(path) as file:
            schema = file.schema_arrow
            here = find_columns(schema, path)
            if here != columns:
                raise InputError(other_columns(path, here, columns))
            check_rows(file, str(path), file_bytes=path.stat().st_size)
            in_file = 0
            for group in range(file.num_row_groups):
                groups.append((sum(map(len, labels)) + in_file, number, group, in_file))
                in_file += file.metadata.row_group(group).num_rows
            column = file.read([columns.label], use_threads=False).column(0)
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise InputError(f"{path}, row {row} {ROW_RULE} has no label: give it one.")
            labels.append(column.to_numpy().astype(np.int64))
            if schema.field(columns.image).type.get_field_index("path") >= 0:
                every, name = range(file.num_row_groups), f"{columns.image}.path"
                for batch in batches(file, str(path), column=name, groups=every):
                    paths += [entry and entry["path"] for entry in batch.column(0).to_pylist()]
            else:
                paths += [None] * in_file
    if not paths:
        raise InputError(f"{files[0]} and its like hold no rows: give files with images.")
    images = RowImages(
        tuple(map(str, files)),
        columns.image,
        tuple(groups),
        len(paths),
        exif_orientation=wanted.exif_orientation,
    )
    return Table(images, np.concatenate(labels), paths)


def _train_labels(table: Table, columns: Columns) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names, and labels 0, 1, ...; the numbers name the classes if nothing else does."""
    if columns.classes is None:
        values, labels = np.unique(table.labels, return_inverse=True)
        return tuple(map(str, values.tolist())), labels.astype(np.int64)
    _check_labels(table, table.labels, columns.classes)
    return columns.classes, table.labels


def _other_labels(
    table: Table, columns: Columns, *, classes: tuple[str, ...], train_labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    labels = table.labels
    if columns.classes is None:
        index = {name: label for label, name in enumerate(classes)}
        labels = np.array([index.get(str(x), -1) for x in labels.tolist()], dtype=np.int64)
    _check_labels(table, labels, classes)
    if strange := sorted(set(labels.tolist()) - set(train_labels.tolist())):
        raise InputError(
            f"{Path(table.images.files[0]).name} has class "
            f"{some(classes[x] for x in strange)}, of which training has no image. "
            "Are training files missing? Both need the same classes."
        )
    return labels


def _check_labels(table: Table, labels: NDArray[np.int64], classes: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        row = int(wrong[0])
        raise InputError(
            f"{table.images.where(row)} has label {table.labels[row]}, which is none of the "
            f"{len(classes)} training classes (so have {wrong.size} of {len(labels)} rows). Images "
            "without a label can't be used: take these rows or this file out."
        )


def _image_files(
    table: Table, rows: NDArray[np.int64], labels: NDArray[np.int64], classes: tuple[str, ...]
) -> ImageFiles:
    samples = tuple(rows.tolist())
    names = Names(table.paths[row] or str(row) for row in samples)
    return ImageFiles(samples, tuple(labels[rows].tolist()), classes, names, table.images)
