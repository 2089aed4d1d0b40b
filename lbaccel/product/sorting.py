"""Images copied into a folder for each class that was predicted."""

from __future__ import annotations

import filecmp
import os
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lbaccel.errors import InputError
from lbaccel.product.prediction import Prediction
from lbaccel.runs.outputs import writable
from lbaccel.text import one_line, printable

UNSURE = "unsure"
MOST_ALIKE = 10_000  # files of one name
_NOT_ON_WINDOWS = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)))
)


class Sorter:
    """Copies each image into FOLDER/CLASS; nothing that is there is overwritten.

    Args:
        folder: where the folders of the classes lie or are made.
        classes: of the model.
        unsure: keep a folder for predictions below the threshold.

    Raises:
        InputError: the folder can't be written to.
    """

    def __init__(self, folder: Path, classes: Sequence[str], *, unsure: bool) -> None:
        if not folder.is_dir():
            writable(folder, "--sort-into", parents=True)
        self.folder = folder
        self.names = folder_names(classes, taken=(UNSURE,) if unsure else ())

    def take(self, prediction: Prediction) -> Path | None:
        """Copy the image; the copy, or the same content that is there; None for an unread file.

        Raises:
            InputError: the folder of the class is a link or a file.
        """
        if prediction.error:
            return None
        name = UNSURE if prediction.unsure else self.names[prediction.classes[0]]
        target = self.folder / name
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise InputError(
                f"--sort-into: {one_line(str(target))} is no plain folder, and nothing is written "
                "through it. Remove it, or give another folder."
            )
        target.mkdir(parents=True, exist_ok=True)
        return _copied(Path(prediction.file), target)


def folder_names(classes: Sequence[str], *, taken: Sequence[str] = ()) -> dict[str, str]:
    """A folder name for each class: letters and digits of any writing stay, the rest becomes `_`.

    Two classes never share one, also where the disk knows no capital letters.

    >>> folder_names(["cat", "CAT", "../up", "猫", "unsure"], taken=["unsure"])
    {'cat': 'cat', 'CAT': 'CAT-2', '../up': '_up', '猫': '猫', 'unsure': 'unsure-2'}
    """
    used = {name.casefold() for name in taken}
    names: dict[str, str] = {}
    for place, name in enumerate(classes):
        safe = "".join(c if c.isalnum() or c in " ._+-" or _joins(c) else "_" for c in name)
        safe = _short(safe).strip(". ") or f"class {place}"
        if safe.split(".")[0].casefold() in _NOT_ON_WINDOWS:
            safe = f"_{safe}"
        chosen, count = safe, 1
        while chosen.casefold() in used:
            count += 1
            chosen = f"{safe}-{count}"
        used.add(chosen.casefold())
        names[name] = chosen
    return names


def _joins(char: str) -> bool:
    """Whether it is a mark of a letter, such as a vowel of Hindi."""
    return unicodedata.category(char).startswith("M") and printable(char) == char


def _short(name: str, most: int = 120) -> str:
    """At most so many bytes: a name on a disk has at most 255."""
    return name.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def _copied(source: Path, folder: Path) -> Path:
    for count in range(1, MOST_ALIKE):
        name = source.name if count == 1 else f"{source.stem}-{count}{source.suffix}"
        target = folder / name
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            plain = target.is_file() and not target.is_symlink()
            if plain and filecmp.cmp(source, target, shallow=False):
                return target  # of an earlier call
            continue
        try:
            with open(descriptor, "wb") as file, source.open("rb") as content:  # noqa: PTH123
                shutil.copyfileobj(content, file)
        except BaseException:  # a part of a copy would pass for an image
            target.unlink()
            raise
        return target
    raise InputError(
        f"--sort-into: {one_line(str(folder))} holds {MOST_ALIKE:,} files named like "
        f"{one_line(source.name)}. Give another folder."
    )
