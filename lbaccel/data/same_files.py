"""Image files that are equal byte for byte."""

from __future__ import annotations

import filecmp
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lbaccel.data.images import ImageArray, ImageFiles, folder_of
from lbaccel.data.sources import Source

MOST_FILES = 20_000  # of both sets together: above, the look itself takes long
_FIRST_BYTES = 2**16


def groups_of_same_bytes(paths: Iterable[Path]) -> list[list[Path]]:
    """The files that are equal to another of them, group by group, each in the order given.

    A file whose size no other has is never read, and of the others the first 64 KiB are; whole
    files are compared where these agree. A file that can't be read is equal to none.
    """
    found = []
    for of_size in _alike(paths, _size):
        for of_start in _alike(of_size, _start):
            found += [group for group in _equal(of_start) if len(group) > 1]
    filecmp.clear_cache()
    return found


def names_of(images: ImageArray | ImageFiles) -> dict[Path, str]:
    """The file of each image, to its name below the folder; empty where images are no files."""
    root = folder_of(images)
    if root is None or not isinstance(images, ImageFiles):
        return {}
    return {root / name: name for name in images.names}


def shared_files(source: Source) -> list[tuple[str, str]]:
    """Name of each validation image that is a training image too, with the name of that one.

    Folders of more than `MOST_FILES` images, parquet files and images in memory are not looked at.
    """
    names, of_val = names_of(source.train), names_of(source.val)
    if len(names) + len(of_val) > MOST_FILES:
        return []
    return shared_in(groups_of_same_bytes(dict.fromkeys([*names, *of_val])), names, of_val)


def shared_in(
    groups: Iterable[Sequence[Path]], names: Mapping[Path, str], of_val: Mapping[Path, str]
) -> list[tuple[str, str]]:
    """The same from the groups of equal files, and the names of both sets by their files."""
    found = [(of_val[path], name) for path, name in names.items() if path in of_val]
    for group in groups:
        twin = next((names[path] for path in group if path in names), None)
        if twin is not None:
            alone = (path for path in group if path in of_val and path not in names)
            found += [(of_val[path], twin) for path in alone]
    return found


def _alike(paths: Iterable[Path], key: Callable[[Path], object]) -> list[list[Path]]:
    groups: dict[object, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            groups[key(path)].append(path)
        except OSError:  # who decodes it says so
            continue
    return [group for group in groups.values() if len(group) > 1]


def _equal(paths: Iterable[Path]) -> list[list[Path]]:
    groups: list[list[Path]] = []
    for path in paths:
        try:
            same = (g for g in groups if filecmp.cmp(g[0], path, shallow=False))
            group = next(same, None)
        except OSError:  # who decodes it says so
            continue
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    return groups


def _size(path: Path) -> int:
    return path.stat().st_size


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(_FIRST_BYTES)).digest()
