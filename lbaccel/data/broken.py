"""Images that can't be read, found before the first update: named, or left out."""

from __future__ import annotations

import copy
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from lbaccel.data.images import EncodedImages, ImageFiles, decode_image, folder_of
from lbaccel.data.opening import some
from lbaccel.data.sources import Source
from lbaccel.errors import CannotRead, InputError, is_of_the_disk
from lbaccel.text import one_line

MOST_FILES = 20_000  # that are looked at where not every file is to be read
LINE_EVERY_SECONDS = 10.0
_EMPTY = "it is empty"
_TAIL = 64  # bytes: some programs write a few behind the end of an image
_AT_ONCE = 1024  # files between two looks at the clock
_RUN = 256  # images that are taken one after the other: their bytes stand in one row group


class Broken(NamedTuple):
    """An image that can't be read: its set ("train" or "val"), its name, the reason."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class Share:
    """The images that one rank looks at, in so many threads."""

    rank: int = 0
    world_size: int = 1
    threads: int = 1


class _Entry(NamedTuple):
    split: str
    name: str
    place: Path | tuple[EncodedImages, Any]  # a file, or a sample and its reader

    def fault(self, *, whole: bool) -> str | None:
        if isinstance(self.place, Path):
            return fault_of(self.place, whole=whole)
        reader, sample = self.place
        try:
            data = reader.data_of(sample)
        except OSError as error:
            return _of_system(error, self.name)
        return _fault_in(BytesIO(data), len(data), self.name, whole=whole)


def broken_images(
    source: Source,
    *,
    whole: bool,
    share: Share | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> list[Broken]:
    """The training and validation images that can't be read.

    A look reads the header of each, and checks that a JPEG, PNG or WebP has its end; only one that
    fails in this is decoded. Of more than `MOST_FILES` images it takes so many, evenly spread.
    With `whole` all are decoded (a JPEG at an eighth of its size, which reads all of it), so none
    that is found good can fail in training.

    Args:
        source: the images; those in memory were decoded when it was opened.
        whole: decode all of them.
        share: of this rank; all images in one thread if None.
        say: prints a line about how far this is, every 10 seconds.

    Raises:
        CannotRead: the system refuses to read a file, which may be whole.
    """
    share = share or Share()
    rows: Sequence[int] = range(num_entries(source))
    if not whole and len(rows) > MOST_FILES:
        rows = _spread(len(rows), MOST_FILES, run=1 if folder_of(source.train) else _RUN)
    ends = [rank * len(rows) // share.world_size for rank in (share.rank, share.rank + 1)]
    found: list[Broken] = []
    told, done = time.monotonic(), 0
    with ThreadPoolExecutor(share.threads) as pool:
        for some_entries in _cut(_entries(source, rows[slice(*ends)])):
            in_files = isinstance(some_entries[0].place, Path)
            looks = (pool.map if in_files else map)(lambda e: e.fault(whole=whole), some_entries)
            for (split, name, _), reason in zip(some_entries, looks, strict=True):
                if reason is not None:
                    found.append(Broken(split, name, reason))
            done += len(some_entries)
            if time.monotonic() - told >= LINE_EVERY_SECONDS:
                told = time.monotonic()
                say(f"scan: {done * share.world_size:,} of {len(rows):,} images read")
    return found


def num_entries(source: Source) -> int:
    """The number of images that `broken_images` would read."""
    return sum(len(images) for _, images in _readable(source))


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
            return _EMPTY
        with path.open("rb") as file:
            return _fault_in(file, size, path.name, whole=whole)
    except OSError as error:
        return _of_system(error, str(path))


def _fault_in(file: IO[bytes], size: int, name: str, *, whole: bool) -> str | None:
    if size == 0:
        return _EMPTY
    try:
        with Image.open(file) as image:
            kind, mode = image.format, image.mode
            if not whole and mode not in ("I", "F") and _has_its_end(file, kind, size):
                return None
            if kind == "JPEG" and mode in ("L", "RGB"):
                image.draft(mode, (1, 1))  # an eighth of each side, from all of the file
                image.load()
                return None
        file.seek(0)
        decode_image(file, one_line(name))
    except (CannotRead, MemoryError):
        raise
    except OSError as error:
        if is_of_the_disk(error):
            raise
        return _reason(error)
    except Exception as error:  # PIL's decoders raise SyntaxError, EOFError, struct.error
        return _reason(error)
    return None


def without(source: Source, broken: Collection[Broken]) -> Source:
    """The source without these images.

    Raises:
        InputError: no training image of a class is left, or no validation image.
    """
    if not broken:
        return source
    left = {}
    for split, images in (("train", source.train), ("val", source.val)):
        names = {b.name for b in broken if b.split == split}
        if names and isinstance(images, ImageFiles):
            rows = [row for row, name in enumerate(_names(images)) if name not in names]
            images = images.only(rows)
        left[split] = images
    train, val = left["train"], left["val"]
    there = Counter(train.labels)
    empty = [name for label, name in enumerate(train.classes) if not there[label]]
    if empty or not len(val):
        lost = f"training image of class {some(empty)}" if empty else "validation image"
        raise InputError(f"--skip-corrupt leaves no {lost}. Mend files, or add some.")
    lines = (
        f"{source.description}; {len(broken)} can't be read and are left out, so {len(train)} "
        f"training and {len(val)} validation images are used"
    )
    return replace(source, train=train, val=val, description=lines)


def listed(broken: Sequence[Broken], source: Source, *, most: int = 3) -> str:
    """The places of the first ones with their reasons, and how many there are besides."""
    roots = {"train": folder_of(source.train), "val": folder_of(source.val)}
    paths = [one_line(str((roots[b.split] or Path()) / b.name)) for b in broken[:most]]
    shown = [f"{path} ({b.reason})" for path, b in zip(paths, broken, strict=False)]
    more = len(broken) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _readable(source: Source) -> Iterator[tuple[str, ImageFiles]]:
    for split, images in (("train", source.train), ("val", source.val)):
        if isinstance(images, ImageFiles) and (
            folder_of(images) is not None or isinstance(images.read, EncodedImages)
        ):
            yield split, images


def _entries(source: Source, rows: Sequence[int]) -> Iterator[_Entry]:
    """Those in these rows, ascending, of both sets after each other."""
    first = 0
    for split, images in _readable(source):
        inside = rows[bisect_left(rows, first) : bisect_left(rows, first + len(images))]
        root, reader = folder_of(images), copy.copy(images.read)  # what it keeps goes with the look
        for row in inside:
            sample = images.samples[row - first]
            if root is not None:
                yield _Entry(split, sample, root / sample)
            elif isinstance(reader, EncodedImages):
                yield _Entry(split, _name(images, reader, row - first), (reader, sample))
        first += len(images)


def _names(images: ImageFiles) -> Sequence[str]:
    """A name that no other image of the set has."""
    if folder_of(images) is None and isinstance(images.read, EncodedImages):
        return [_name(images, images.read, row) for row in range(len(images))]
    return images.names


def _name(images: ImageFiles, reader: EncodedImages, row: int) -> str:
    """The place of the bytes, and the name that the image has in its archive, if it has one."""
    place, name = reader.name_of(images.samples[row]), images.names[row]
    return place if name.isdigit() else f"{place}: {name}"


def _spread(count: int, most: int, *, run: int) -> list[int]:
    """So many rows from all over, in runs of rows whose bytes lie together."""
    run = min(run, most)
    starts = [i * count * run // most for i in range(most // run)]
    return [row for start in starts for row in range(start, min(start + run, count))]


def _cut(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    while part := list(islice(entries, _AT_ONCE)):
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


def _of_system(error: OSError, where: str) -> str:
    if is_of_the_disk(error):
        raise CannotRead(f"{one_line(where)} can't be read: {error.strerror}.") from error
    return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "PIL knows no such format"
    if isinstance(error, FileNotFoundError):
        return "it is absent: a link that leads nowhere"
    if isinstance(error.__cause__, Exception):  # of `decode_image`
        return _reason(error.__cause__)
    if not isinstance(error, (OSError, InputError, Image.DecompressionBombError)):
        return "it is cut off or damaged"  # the text of a struct.error would not help
    plain = getattr(error, "strerror", None) or str(error)
    text = one_line(" ".join(plain.split()))
    return text[:117] + "..." if len(text) > 120 else text or type(error).__name__
