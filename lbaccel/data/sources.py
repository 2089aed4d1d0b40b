"""Where images come from: a name or a path becomes a training and a validation set."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from lbaccel.data.images import ImageArray, ImageFiles, read_image
from lbaccel.data.parquet import open_parquet
from lbaccel.data.split import SPLIT, check_val_fraction, split_by_hash
from lbaccel.errors import InputError, RunFailed, check_seed, reading

__all__ = ["ImageArray", "ImageFiles", "Source", "open_source"]

FORMS = ("digits", "cifar10", "cifar100", "folder:PATH", "parquet:PATH")
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
VAL_FOLDERS = ("val", "validation", "test")
MOST_VISITS = 100  # of one folder below a class, by links
CACHE = Path("~/.cache/lbaccel")


@dataclass(frozen=True, eq=False)
class Source:
    """A training and a validation set with the same classes, and one line that describes them."""

    train: ImageArray | ImageFiles
    val: ImageArray | ImageFiles
    name: str
    num_channels: int
    description: str
    held_out: bool = True  # the validation set is a share of the data, not one of their own
    test: ImageArray | ImageFiles | None = None  # never touched by training


class _Halves(NamedTuple):
    train: ImageArray | ImageFiles
    val: ImageArray | ImageFiles
    how: str  # where the validation set comes from


def open_source(
    spec: str, *, val_fraction: float = 0.2, seed: int = 0, data_dir: Path | None = None
) -> Source:
    """The images that `spec` names.

    Where the data have no validation set of their own, round(val_fraction * size) images of each
    class are held out, by a hash of (seed, file name): see `split_by_hash`.

    Args:
        spec: digits, cifar10, cifar100, folder:PATH (a sub-folder for each class, below train/
            and val/ or not), or parquet:PATH (train-*.parquet, as on the Hugging Face hub).
        val_fraction: the share of each class to hold out, between 0 and 1.
        seed: of the split.
        data_dir: where CIFAR lies or is downloaded to; ~/.cache/lbaccel if None.

    Raises:
        InputError: `spec` is none of these, or the data are not as they must be.
        RunFailed: a download failed.

    >>> print(open_source("digits").description)
    digits: 1438 training and 359 validation images of 8x8x1, 10 classes, split by hash of the index
    """
    check_val_fraction(val_fraction)
    seed = check_seed("seed", seed)
    kind, _, path = spec.partition(":")
    if kind in AT_A_PATH and path:
        root = Path(path).expanduser().absolute()
        halves = _Halves(*AT_A_PATH[kind](root, val_fraction=val_fraction, seed=seed))
    elif spec == "digits":
        halves = _digits(val_fraction, seed)
    elif spec in CIFAR:
        halves = _cifar(spec, data_dir or CACHE.expanduser())
    else:
        raise InputError(_unknown(spec))
    return _source(spec, halves)


def _source(spec: str, halves: _Halves) -> Source:
    train, val, how = halves
    num_channels, size = 3, ""
    if isinstance(train, ImageArray):
        num_channels, height, width = train.images.shape[1:]
        size = f" of {height}x{width}x{num_channels}"
    description = (
        f"{spec}: {len(train)} training and {len(val)} validation images{size}, "
        f"{len(train.classes)} classes, {how}"
    )
    return Source(train, val, spec, num_channels, description, how.startswith(SPLIT))


def _unknown(spec: str) -> str:
    kind = spec.partition(":")[0].lower()
    near = difflib.get_close_matches(kind, [form.partition(":")[0] for form in FORMS], n=1)
    if Path(spec).expanduser().is_dir():
        meant = f" Did you mean folder:{spec}, or parquet:{spec}?"
    elif near:
        meant = f" Did you mean {next(form for form in FORMS if form.startswith(near[0]))}?"
    else:
        meant = ""
    return f"data={spec!r} is none of {', '.join(FORMS)}.{meant}"


def _digits(val_fraction: float, seed: int) -> _Halves:
    from sklearn.datasets import load_digits  # a second to import, and needed here only

    images, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets.astype(np.int64))
    classes = tuple("0123456789")
    train, val = split_by_hash(
        [str(index) for index in range(len(labels))],
        labels.tolist(),
        classes=classes,
        val_fraction=val_fraction,
        seed=seed,
    )
    return _Halves(
        ImageArray(pixels[train], labels[train], classes),
        ImageArray(pixels[val], labels[val], classes),
        f"{SPLIT} of the index",
    )


def _cifar(name: str, folder: Path) -> _Halves:
    def both(download: bool) -> tuple[Any, Any]:
        kind = CIFAR[name]
        return kind(folder, True, download=download), kind(folder, False, download=download)

    try:
        sets = both(False)
    except RuntimeError:  # not there, or its checksums don't fit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{name}.lock"):  # the ranks of one machine come together
                sets = both(True)
        except (OSError, RuntimeError, EOFError, HTTPException, TarError) as error:
            kind = CIFAR[name]
            raise RunFailed(
                f"{name} is not in {folder} and could not be downloaded: {error}. Without network, "
                f"put {kind.filename} (from {kind.url}, md5 {kind.tgz_md5}) into {folder}, or use "
                "--data parquet:PATH with a copy from the Hugging Face hub."
            ) from error
    train, val = (
        ImageArray(
            torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(half.targets, dtype=torch.int64),
            tuple(half.classes),
        )
        for half in sets
    )
    return _Halves(train, val, "validation is its test set")


def open_folder(
    root: Path, *, val_fraction: float, seed: int
) -> tuple[ImageFiles, ImageFiles, str]:
    """Training set, validation set, and in words where the second comes from.

    `root` holds train/ and val/ (or validation/, or test/), each with a sub-folder for each class,
    or these sub-folders themselves. Files and folders whose name starts
    with a dot are passed over.

    Raises:
        InputError: the folder, the sub-folders or the images of a class are missing, or the two
            halves have different classes; a folder can't be read.
    """
    if not root.is_dir():
        raise InputError(
            f"folder:{root} is {'a file' if root.exists() else 'absent'}: give a folder with a "
            "sub-folder for each class, or with train/ and val/."
        )
    folders = _sub_folders(root)
    val_name = next((name for name in VAL_FOLDERS if name in folders), None)
    if "train" in folders and val_name:
        train, val = _scan(root / "train"), _scan(root / val_name)
        if train.classes != val.classes:
            raise InputError(_different(root, val_name, train.classes, val.classes))
        return train, val, f"validation from {val_name}/"
    if folders and set(folders) <= set(VAL_FOLDERS):
        raise InputError(
            f"folder:{root} has {', '.join(f'{name}/' for name in folders)} but no train/. Add it, "
            "or give the folder that holds a sub-folder for each class."
        )
    nested = "train" in folders and bool(_sub_folders(root / "train"))
    if nested and len(folders) > 1:
        raise InputError(
            f"folder:{root} has train/ with classes, and none of val/, validation/ or test/; what "
            f"are {', '.join(f'{name}/' for name in folders if name != 'train')}? Rename one to "
            f"val, or give folder:{root / 'train'} to hold out {val_fraction} of it."
        )
    everything = _scan(root / "train" if nested else root)
    halves = split_by_hash(
        everything.names,
        everything.labels,
        classes=everything.classes,
        val_fraction=val_fraction,
        seed=seed,
    )
    train, val = (_take(everything, rows) for rows in halves)
    return train, val, f"{SPLIT} of the file name"


def _scan(root: Path) -> ImageFiles:
    classes = _sub_folders(root)
    if not classes:
        raise InputError(
            f"{root} has no sub-folders: each class needs one, as in "
            f"{root / 'roses' / '1.jpg'}. Sort the images into sub-folders."
        )
    found = [(path, label) for label, name in enumerate(classes) for path in _images(root / name)]
    prefix = len(str(root).rstrip(os.sep)) + 1
    named = [(path[prefix:].replace(os.sep, "/"), label) for path, label in found]
    named = [(name, label) for name, label in named if "/." not in name]
    if not named:
        raise InputError(
            f"no images in {root} and its {len(classes)} sub-folders: files must end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    labels = tuple(label for _, label in named)
    if empty := sorted(set(range(len(classes))) - set(labels)):
        raise InputError(
            f"{root}: class {', '.join(repr(classes[label]) for label in empty)} has no images "
            f"({', '.join(IMG_EXTENSIONS)}). Add some, or remove the folder."
        )
    names = tuple(name for name, _ in named)
    return ImageFiles(names, labels, tuple(classes), names, partial(read_image, root=str(root)))


def _images(folder: Path) -> Iterator[str]:
    """Paths of the images below a folder, in torchvision's order.

    Raises:
        CannotRead: a folder that can't be read: torchvision, as `os.walk`, would pass it over.
        InputError: a link that leads back to a folder around it: its images would come many times.
    """

    def refuse(error: OSError) -> None:
        raise error

    with reading(folder):
        walked = sorted(_without_loops(folder, refuse))
    for where, _, files in walked:
        for name in sorted(files):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(where, name)  # noqa: PTH118


def _without_loops(
    folder: Path, refuse: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` through links, which stops at a folder that is one of those around it."""
    visits: Counter[tuple[int, int]] = Counter()
    around = {str(folder): {_identity(folder): str(folder)}}
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        above = around.pop(where)
        this = _identity(where)
        visits[this] += 1
        if visits[this] > MOST_VISITS:
            raise InputError(
                f"{where} is reached through more than {MOST_VISITS} links below {folder}: each "
                "image would count that often. Remove these links."
            )
        for name in folders:
            path = os.path.join(where, name)  # noqa: PTH118
            if (this := _identity(path)) in above:
                raise InputError(
                    f"{path} leads back to {above[this]}, the folder around it: each image would "
                    "count again and again. Remove this link."
                )
            around[path] = {**above, this: path}
        yield where, folders, files


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116
    return found.st_dev, found.st_ino


def _sub_folders(root: Path) -> list[str]:
    with reading(root):
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _take(files: ImageFiles, rows: list[int]) -> ImageFiles:
    names = tuple(files.names[row] for row in rows)
    labels = tuple(files.labels[row] for row in rows)
    return ImageFiles(names, labels, files.classes, names, files.read)


def _different(root: Path, val: str, train: tuple[str, ...], other: tuple[str, ...]) -> str:
    parts = [
        f"{', '.join(map(repr, only))} only in {where}/"
        for where, only in (
            ("train", [name for name in train if name not in other]),
            (val, [name for name in other if name not in train]),
        )
        if only
    ]
    return (
        f"folder:{root}: train/ has {len(train)} classes and {val}/ has {len(other)}; "
        f"{'; '.join(parts)}. Both need the same sub-folders."
    )


# kind: the function that opens it, as `open_folder` does
AT_A_PATH = {"folder": open_folder, "parquet": open_parquet}
