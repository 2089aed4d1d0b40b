"""Image files that stand in the training and in the validation set, byte for byte."""

from __future__ import annotations

import filecmp
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from lbaccel.data.images import folder_of
from lbaccel.data.sources import Source

MOST_FILES = 20_000  # of both sets together: above, the look itself takes long
_FIRST_BYTES = 2**16


def shared_files(source: Source) -> list[tuple[str, str]]:
    """Name of each validation image that is a training image too, with the name of that one.

    Files of another size are never read, and of those of one size the first 64 KiB; whole files are
    compared where these agree. Folders of more than `MOST_FILES` images, parquet files and images
    in memory are not looked at.
    """
    train, val = folder_of(source.train), folder_of(source.val)
    if train is None or val is None or len(source.train) + len(source.val) > MOST_FILES:
        return []
    names = {train / name: name for name in source.train.names}
    of_val = {val / name: name for name in source.val.names}
    found = []
    for ours, theirs in _candidates(of_val, names, _size):
        for some, others in _candidates(ours, theirs, _start):
            for path in some:
                same = (p for p in others if filecmp.cmp(path, p, shallow=False))
                if (twin := next(same, None)) is not None:
                    found.append((of_val[path], names[twin]))
    filecmp.clear_cache()
    return found


def _candidates(
    ours: Iterable[Path], theirs: Iterable[Path], key: Callable[[Path], object]
) -> list[tuple[list[Path], list[Path]]]:
    """The files of both sides, grouped by a key that they share; what can't be read has none."""
    groups: dict[object, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for side, paths in enumerate((ours, theirs)):
        for path in paths:
            try:
                groups[key(path)][side].append(path)
            except OSError:  # who decodes it says so
                continue
    return [group for group in groups.values() if all(group)]


def _size(path: Path) -> int:
    return path.stat().st_size


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(_FIRST_BYTES)).digest()
