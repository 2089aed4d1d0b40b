"""Image files that can't be read, found before the first update: named, or left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image, UnidentifiedImageError

from lbaccel.data.images import ImageArray, ImageFiles, decode_image, folder_of
from lbaccel.data.opening import some
from lbaccel.data.sources import Source
from lbaccel.errors import CannotRead, InputError, is_of_the_disk
from lbaccel.text import one_line

MOST_FILES = 20_000  # that are looked at where not every file is to be read
LINE_EVERY_SECONDS = 10.0
_TAIL = 64  # bytes: some programs write a few behind the end of an image
_AT_ONCE = 1024  # files between two looks at the clock


class Broken(NamedTuple):
    """A file that can't be read as an image: its set ("train" or "val"), its name, the reason."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class Share:
    """The files that one rank looks at, each `world_size`-th from `rank`, in so many threads."""

    rank: int = 0
    world_size: int = 1
    threads: int = 1


def broken_files(
    source: Source,
    *,
    whole: bool,
    share: Share | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> list[Broken]:
    """The training and validation files that can't be read as images.

    A look opens each file, reads its header, and checks that a JPEG, PNG or WebP has its end; only
    a file that fails in this is decoded. Of more than `MOST_FILES` files it takes so many, evenly
    spread. With `whole` all files are decoded (a JPEG at an eighth of its size, which reads all of
    it), so none that is found good can fail in training.

    Args:
        source: the images; those in parquet files and in memory are not looked at.
        whole: decode all files.
        share: of this rank; all files in one thread if None.
        say: prints a line about how far this is, every 10 seconds.

    Raises:
        CannotRead: the system refuses to read a file, which may be whole.
    """
    share = share or Share()
    files = _files(source)
    if not whole and len(files) > MOST_FILES:
        files = [files[i * len(files) // MOST_FILES] for i in range(MOST_FILES)]
    mine, found = files[share.rank :: share.world_size], []
    told, done = time.monotonic(), 0
    with ThreadPoolExecutor(share.threads) as pool:
        for some_files in _cut(mine):
            reasons = pool.map(lambda f: fault_of(f[2], whole=whole), some_files)
            for (split, name, _), reason in zip(some_files, reasons, strict=True):
                if reason is not None:
                    found.append(Broken(split, name, reason))
            done += len(some_files)
            if time.monotonic() - told >= LINE_EVERY_SECONDS:
                told = time.monotonic()
                say(f"scan: {done * share.world_size:,} of {len(files):,} image files read")
    return found


def num_files(source: Source) -> int:
    """The number of files that `broken_files` would read."""
    return len(_files(source))


def fault_of(path: Path, *, whole: bool = True) -> str | None:
    """Why a file can't be read as an image, in a few words; None where nothing is wrong.

    Args:
        path: of the file.
        whole: decode it in any case; else only where its header or its end is not as it must be.

    Raises:
        CannotRead: the system refuses to read it.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            return "it is empty"
        with path.open("rb") as file:
            with Image.open(file) as image:
                kind, mode = image.format, image.mode
                if not whole and mode not in ("I", "F") and _has_its_end(file, kind, size):
                    return None
                if kind == "JPEG" and mode in ("L", "RGB"):
                    image.draft(mode, (1, 1))  # an eighth of each side, from all of the file
                    image.load()
                    return None
            file.seek(0)
            decode_image(file, one_line(path.name))
    except (CannotRead, MemoryError):
        raise
    except OSError as error:
        if is_of_the_disk(error):
            raise CannotRead(f"{one_line(str(path))} can't be read: {error.strerror}.") from error
        return _reason(error)
    except Exception as error:  # PIL's decoders raise SyntaxError, EOFError, struct.error
        return _reason(error)
    return None


def without(source: Source, broken: Collection[Broken]) -> Source:
    """The source without these files.

    Raises:
        InputError: no training image of a class is left, or no validation image.
    """
    if not broken:
        return source
    left = {}
    for split, images in (("train", source.train), ("val", source.val)):
        names = {b.name for b in broken if b.split == split}
        if names and isinstance(images, ImageFiles):
            rows = [row for row, name in enumerate(images.names) if name not in names]
            images = images.only(rows)
        left[split] = images
    train, val = left["train"], left["val"]
    there = Counter(train.labels)
    empty = [name for label, name in enumerate(train.classes) if not there[label]]
    if empty or not len(val):
        lost = f"training image of class {some(empty)}" if empty else "validation image"
        raise InputError(f"--skip-corrupt leaves no {lost}. Mend files, or add some.")
    lines = f"{source.description}; {len(broken)} of them can't be read and are left out"
    return replace(source, train=train, val=val, description=lines)


def listed(broken: Sequence[Broken], source: Source, *, most: int = 3) -> str:
    """The paths of the first files with their reasons, and how many there are besides."""
    roots = {"train": folder_of(source.train), "val": folder_of(source.val)}
    paths = [one_line(str((roots[b.split] or Path()) / b.name)) for b in broken[:most]]
    shown = [f"{path} ({b.reason})" for path, b in zip(paths, broken, strict=False)]
    more = len(broken) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _files(source: Source) -> list[tuple[str, str, Path]]:
    found = []
    for split, images in (("train", source.train), ("val", source.val)):
        root = folder_of(images)
        if root is not None and not isinstance(images, ImageArray):
            found += [(split, name, root / name) for name in images.samples]
    return found


def _cut(files: Sequence[tuple[str, str, Path]]) -> Iterator[list[tuple[str, str, Path]]]:
    rest = iter(files)
    while part := list(islice(rest, _AT_ONCE)):
        yield part


def _riff_is_whole(size: int, head: bytes, tail: bytes) -> bool:
    return int.from_bytes(head[4:8], "little") + 8 <= size


_ENDS: dict[str | None, Callable[[int, bytes, bytes], bool]] = {
    "JPEG": lambda size, head, tail: b"\xff\xd9" in tail,
    "PNG": lambda size, head, tail: b"IEND" in tail,
    "WEBP": _riff_is_whole,
}


def _has_its_end(file: IO[bytes], kind: str | None, size: int) -> bool:
    """Whether an image of a format that marks its end has this mark; others are believed."""
    rule = _ENDS.get(kind)
    if rule is None:
        return True
    place = file.tell()
    file.seek(0)
    head = file.read(12)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    file.seek(place)  # where PIL goes on
    return rule(size, head, tail)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "PIL knows no such format"
    if isinstance(error, FileNotFoundError):
        return "it is absent: a link that leads nowhere"
    if isinstance(error.__cause__, Exception):  # of `decode_image`
        return _reason(error.__cause__)
    if not isinstance(error, (OSError, InputError, Image.DecompressionBombError)):
        return "it is cut off or damaged"  # the text of a struct.error would not help
    text = one_line(" ".join(str(error).split()))
    return text[:117] + "..." if len(text) > 120 else text or type(error).__name__
