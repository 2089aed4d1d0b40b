"""Images in a folder with a sub-folder for each class, below train/, val/ and test/ or not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.names import Names
from lbaccel.data.opening import AS_UNUSED, AS_VAL, Opening, Sets, some
from lbaccel.data.split import SPLIT, split_by_hash
from lbaccel.errors import CannotRead, InputError, reading

VAL_FOLDERS = ("val", "validation")
TEST = "test"
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jxl", ".cr2", ".nef", ".dng")
MOST_VISITS = 100  # of one folder below a class, by links


def open_folder(root: Path, wanted: Opening) -> Sets:
    """The images below `root`, which holds train/, val/ (or validation/) and test/, or classes.

    Each of these has a sub-folder for each class. Without val/ a share of the training images is
    held out; test/ is then the validation set only if `wanted.test_split` says so. Files and
    folders whose name starts with a dot are passed over.

    Raises:
        InputError: the folder, the sub-folders or the images of a class are missing, or training
            and validation have different classes; a folder can't be read.
    """
    if not root.is_dir():
        raise InputError(
            f"folder:{root} is {'a file' if root.exists() else 'absent'}: give a folder with a "
            "sub-folder for each class, or with train/ and val/."
        )
    folders = _sub_folders(root)
    val_folders = (*VAL_FOLDERS, TEST) if wanted.test_split == AS_VAL else VAL_FOLDERS
    alone = wanted.test_split == AS_UNUSED
    val_name = next((n for n in val_folders if n in folders and not alone), None)
    read = partial(read_image, exif_orientation=wanted.exif_orientation)
    unread: Counter[str] = Counter()
    if "train" in folders and val_name:
        train, val = (_scan(root / name, read, unread) for name in ("train", val_name))
        if train.classes != val.classes:
            raise InputError(_different(root, val_name, train.classes, val.classes))
        test, note = _test_set(root, read, train.classes) if val_name != TEST else (None, "")
        return Sets(train, val, f"validation from {val_name}/{note}{_said(unread)}", test)
    if folders and set(folders) <= {*VAL_FOLDERS, TEST}:
        raise InputError(
            f"folder:{root} has {', '.join(f'{name}/' for name in folders)} but no train/. Add it, "
            "or give the folder that holds a sub-folder for each class."
        )
    nested = "train" in folders and bool(_sub_folders(root / "train"))
    if nested and not alone and set(folders) - {"train", TEST}:
        raise InputError(
            f"folder:{root} has train/ with classes, and none of val/, validation/ or test/; what "
            f"are {', '.join(f'{name}/' for name in folders if name != 'train')}? Rename one to "
            f"val, or give folder:{root / 'train'} to hold out {wanted.val_fraction} of it."
        )
    everything = _scan(root / "train" if nested else root, read, unread)
    halves = split_by_hash(
        everything.names,
        everything.labels,
        classes=everything.classes,
        val_fraction=wanted.val_fraction,
        seed=wanted.seed,
    )
    train, val = (everything.only(rows) for rows in halves)
    looks = nested and not alone
    test, note = _test_set(root, read, train.classes) if looks else (None, "")
    return Sets(train, val, f"{SPLIT} of the file name{note}{_said(unread)}", test)


def _test_set(
    root: Path, read: Callable[..., Image.Image], classes: tuple[str, ...]
) -> tuple[ImageFiles | None, str]:
    """The images below test/, which may have some of the training classes; or why they are none.

    Training looks at none of them, so whatever is wrong with them is no reason to stop it.
    """
    folder = root / TEST
    if not folder.is_dir():
        return None, ""
    try:
        found = _scan(folder, read, Counter())
    except CannotRead:
        raise
    except InputError:
        return None, "; test/ is not used: it needs images in a sub-folder for each class"
    if strange := sorted(set(found.classes) - set(classes)):
        return None, f"; test/ is not used: training has no class {some(strange)}"
    number = {name: label for label, name in enumerate(classes)}
    labels = tuple(number[found.classes[label]] for label in found.labels)
    return replace(found, labels=labels, classes=classes), ""


def _said(unread: Counter[str]) -> str:
    """The images that are passed over since of their kind none is read."""
    kinds = [f"{count} {kind}" for kind, count in sorted(unread.items())]
    return f"; {' and '.join(kinds)} files are not read: save them as PNG or JPEG" if kinds else ""


def _scan(root: Path, read: Callable[..., Image.Image], unread: Counter[str]) -> ImageFiles:
    classes = _sub_folders(root)
    if not classes:
        raise InputError(
            f"{root} has no sub-folders: each class needs one, as in "
            f"{root / 'roses' / '1.jpg'}. Sort the images into sub-folders."
        )
    prefix = len(str(root).rstrip(os.sep)) + 1
    labels: list[int] = []

    def found() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in _images(root / name, unread):
                below = path[prefix:].replace(os.sep, "/")
                if "/." not in below:
                    labels.append(label)
                    yield below

    names = Names(found())
    if not names:
        raise InputError(
            f"no images in {root} and its {len(classes)} sub-folders: files must end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    if empty := sorted(set(range(len(classes))) - set(labels)):
        raise InputError(
            f"{root}: class {some(classes[label] for label in empty)} has no images "
            f"({', '.join(IMG_EXTENSIONS)}). Add some, or remove the folder."
        )
    return ImageFiles(names, tuple(labels), tuple(classes), names, partial(read, root=str(root)))


def _images(folder: Path, unread: Counter[str]) -> Iterator[str]:
    """Paths of the images below a folder, in torchvision's order; others are counted by ending.

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
            elif (kind := os.path.splitext(name)[1].lower()) in UNREAD:  # noqa: PTH122
                unread[kind] += 1


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


def _different(root: Path, val: str, train: tuple[str, ...], other: tuple[str, ...]) -> str:
    parts = [
        f"{some(only)} only in {where}/"
        for where, only in (
            ("train", sorted(set(train) - set(other))),
            (val, sorted(set(other) - set(train))),
        )
        if only
    ]
    return (
        f"folder:{root}: train/ has {len(train)} classes and {val}/ has {len(other)}; "
        f"{'; '.join(parts)}. Both need the same sub-folders."
    )
