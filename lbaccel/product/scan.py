"""A look at a folder of photographs before anything is trained on it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from lbaccel.data.broken import Broken, Share, broken_images
from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.opening import some
from lbaccel.data.same_files import MOST_FILES, groups_of_same_bytes, names_of, shared_in
from lbaccel.data.sources import Source

FEW = 20  # images of a class, below which its figures say little
UNEVEN = 3.0  # largest class over smallest one
THREADS = 4


@dataclass(frozen=True)
class Scan:
    """The facts of a folder of images. Names are those of the files below their folder.

    Attributes:
        counts: training images of each class.
        num_val: validation images.
        broken: files that can't be read as images.
        copies: groups of training files that are equal byte for byte.
        contradicting: those of them whose files stand in several classes.
        shared: (validation file, training file) that are equal.
        turned: images that a viewer shows turned, by their EXIF orientation.
        short_sides: pixels of the shorter side: smallest, median, largest; None for no files.
        looked_at: files that were opened; the rest of a large folder was not.
    """

    counts: dict[str, int]
    num_val: int
    broken: tuple[Broken, ...] = ()
    copies: tuple[tuple[str, ...], ...] = ()
    contradicting: tuple[tuple[str, ...], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    turned: int = 0
    short_sides: tuple[int, int, int] | None = None
    looked_at: int = 0

    @property
    def num_train(self) -> int:
        """All training images."""
        return sum(self.counts.values())

    @property
    def unevenness(self) -> float:
        """The largest class over the smallest one."""
        return max(self.counts.values()) / max(1, min(self.counts.values()))

    def lines(self) -> list[str]:
        """Sentences for the user, warnings only where something is wrong."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        sizes = sorted(self.counts.items(), key=lambda pair: -pair[1])
        (most, largest), (least, smallest) = sizes[0], sizes[-1]
        each = f"{smallest} ({least!r}) to {largest} ({most!r})" if largest > smallest else smallest
        yield (
            f"{self.num_train} training and {self.num_val} validation images of "
            f"{len(self.counts)} classes: {each} a class in training"
        )
        if self.short_sides is not None:
            low, median, high = self.short_sides
            yield f"shorter side of {self.looked_at} images: {low} to {high} px, median {median}"
        if self.turned:
            yield f"{self.turned} images are turned by their EXIF orientation"
        if self.unevenness > UNEVEN:
            yield (
                f"warning: {most!r} has {self.unevenness:.1f} times the images of {least!r}: read "
                "the balanced accuracy of lbaccel eval beside top-1"
            )
        few = [name for name, count in self.counts.items() if count < FEW]
        if few:
            yield (
                f"warning: {some(few)} {'has' if len(few) == 1 else 'have'} fewer than {FEW} "
                "training images"
            )
        if self.contradicting:
            yield (
                f"warning: {_counted(len(self.contradicting), 'image')} in several classes at "
                f"once, such as {some(self.contradicting[0])}: one of the labels is wrong"
            )
        if self.copies:
            spare = sum(len(group) - 1 for group in self.copies)
            yield (
                f"warning: {_counted(spare, 'training file')} a copy of another one, such as "
                f"{some(self.copies[0])}"
            )
        if self.shared:
            val, train = self.shared[0]
            yield (
                f"warning: {_counted(len(self.shared), 'validation image')} a training image too "
                f"({val!r} is {train!r}): validation looks better than new images will"
            )
        if self.broken:
            _, name, reason = self.broken[0]
            yield (
                f"warning: {_counted(len(self.broken), 'file')} no readable image: {name!r} "
                f"({reason})" + (f" and {len(self.broken) - 1} more" * (len(self.broken) > 1))
            )


def scan(source: Source) -> Scan:
    """Look at the images of a source; of more than `MOST_FILES` files only the counts are read."""
    counted = Counter(int(label) for label in source.train.labels)
    counts = {name: counted[label] for label, name in enumerate(source.train.classes)}
    found = Scan(counts, len(source.val))
    of_train, of_val = names_of(source.train), names_of(source.val)
    names = of_train | of_val
    if not names or len(names) > MOST_FILES:
        return found
    with ThreadPoolExecutor(THREADS) as threads:
        headers = list(threads.map(_header, names))
    good = [header for header in headers if header is not None]
    sides = sorted(min(width, height) for width, height, _ in good)
    groups = groups_of_same_bytes(names)
    of_training = ([of_train[path] for path in group if path in of_train] for group in groups)
    copies = [tuple(group) for group in of_training if len(group) > 1]
    label_of = dict(zip(_names(source.train), map(int, source.train.labels), strict=True))
    return Scan(
        counts=counts,
        num_val=len(source.val),
        broken=tuple(broken_images(source, whole=True, share=Share(threads=THREADS))),
        copies=tuple(copies),
        contradicting=tuple(g for g in copies if len({label_of[name] for name in g}) > 1),
        shared=tuple(shared_in(groups, of_train, of_val)),
        turned=sum(turned for _, _, turned in good),
        short_sides=(sides[0], int(statistics.median(sides)), sides[-1]) if sides else None,
        looked_at=len(good),
    )


def _names(images: ImageArray | ImageFiles) -> Sequence[str]:
    return images.names if isinstance(images, ImageFiles) else ()


def _header(path: Path) -> tuple[int, int, bool] | None:
    """Width, height and whether EXIF turns it; None where the file has no readable header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
            return *image.size, turned
    except Exception:  # Pillow's readers raise nearly anything; `broken_images` says what it is
        return None


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"
