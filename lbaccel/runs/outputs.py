"""A file that a command writes where the user says: nothing that is not lbaccel's is replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lbaccel.errors import InputError


@dataclass(frozen=True)
class Own:
    """A kind of file that lbaccel writes, by which an earlier one of it is known.

    Args:
        name: in words, such as "figure of lbaccel".
        is_one: whether a plain file is of this kind; it may raise OSError or ValueError.
    """

    name: str
    is_one: Callable[[Path], bool]


def ends_of(path: Path, size: int = 16384) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file, at most so many each."""
    with path.open("rb") as file:
        head = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return head, file.read(size)


def what_is_there(path: Path) -> str | None:
    """The obstacle where a file is to be written, in words; None for a plain file or none.

    >>> what_is_there(Path("absent.csv"))
    """
    if path.is_symlink():  # also one that leads nowhere, for which `exists` is false
        return "it is a link"
    if path.is_dir():
        return "it is a folder"
    return "it is no plain file" if path.exists() and not path.is_file() else None


def writable(path: Path, flag: str, *, parents: bool = False, own: Own | None = None) -> Path:
    """The path, where a file of that name can be written; tried before the work, without a trace.

    Args:
        path: of a file, there or not; one that is there is not changed.
        flag: that it was given with, for the error.
        parents: make the missing folders.
        own: a file that is there must be of this kind, or empty; None leaves that to the caller.

    Raises:
        InputError: it can't be written, and why.
    """
    folder = path.parent
    try:
        if parents:
            folder.mkdir(parents=True, exist_ok=True)
        if (there := what_is_there(path)) is not None:
            raise _InTheWay(0, there)
        if path.is_file():
            with path.open("ab"):
                pass
            foreign = own is not None and path.stat().st_size > 0 and not _is_one(own, path)
            if own is not None and foreign:
                raise _InTheWay(0, f"it is there, and is no {own.name}")
        with tempfile.TemporaryFile(dir=folder):  # nobody else can meet its name
            pass
    except OSError as error:
        reason, hint = error.strerror or str(error), "Use another file."
        if not parents and isinstance(error, FileNotFoundError):
            reason, hint = f"there is no folder {folder}", f"Use: mkdir -p {folder}"
        elif isinstance(error, (FileExistsError, NotADirectoryError)):  # mkdir says the first
            reason = f"{folder} is no folder"
        raise InputError(f"{flag} {path} can't be written: {reason}. {hint}") from error
    return path


class _InTheWay(OSError):
    """Something at the path that is not to be replaced."""


def _is_one(own: Own, path: Path) -> bool:
    try:
        return own.is_one(path)
    except ValueError:
        return False
