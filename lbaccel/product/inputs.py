"""The files that a prediction is asked for: names, folders, patterns, and a list on a stream."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from torchvision.datasets.folder import IMG_EXTENSIONS

from lbaccel.errors import InputError, reading
from lbaccel.text import one_line

STREAM = "-"


def files_named(names: Iterable[str | os.PathLike[str]], *, stream: IO[bytes] | None) -> list[str]:
    """The files, in the order in which they are named.

    Args:
        names: a file, there or not; a folder, whose images below it are taken, sorted; a pattern
            with `*`, `?`, `[` or `**`; or `-` for what `stream` names.
        stream: names of files, one a line, or each ended by a zero byte, as `find -print0` writes.

    Raises:
        InputError: nothing is named, a pattern that fits no file, or a folder without images.
    """
    found: list[str] = []
    for given in names:
        name = os.fspath(given)
        found += _on_stream(stream) if name == STREAM else _named(name)
    if not found:
        raise InputError("no image is named. Give files, folders, patterns such as 'new/*.jpg', -.")
    return found


def _named(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        below = list(_below(path))
        if not below:
            raise InputError(
                f"{one_line(name)} holds no image: their names end in {', '.join(IMG_EXTENSIONS)}."
            )
        return below
    if path.exists() or not glob.has_magic(name):
        return [name]  # one that is absent becomes a row with its error
    matching = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  # it may be absolute
    files: list[str] = []
    for found in matching:
        files += _below(Path(found)) if Path(found).is_dir() else [found]
    if not files:
        raise InputError(f"{one_line(name)} fits no file.")
    return files


def _below(folder: Path) -> Iterator[str]:
    """The images below a folder; what begins with a dot, and folders behind links, are left out."""

    def refuse(error: OSError) -> None:
        raise error

    with reading(folder):
        for where, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                    yield os.path.join(where, name)  # noqa: PTH118  # Path drops a leading ./


def _on_stream(stream: IO[bytes] | None) -> Sequence[str]:
    if stream is None:
        raise InputError("- names the files on standard input, which there is not.")
    content = stream.read()
    ends = b"\0" if b"\0" in content else b"\n"
    return [os.fsdecode(name) for name in content.split(ends) if name.strip()]
