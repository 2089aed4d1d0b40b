"""How a source is opened, and what it is opened to: the terms that all kinds of data share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.split import SPLIT, split_by_hash
from lbaccel.text import one_line

AS_TEST, AS_VAL, AS_UNUSED = "test", "val", "unused"
TEST_SPLITS = (AS_TEST, AS_VAL, AS_UNUSED)
MOST_NAMED = 5  # in a message


@dataclass(frozen=True)
class Opening:
    """How the images are to be split and read.

    Attributes:
        val_fraction: share of each class that is held out where there is no validation set.
        seed: of that split.
        test_split: what a test set is where there is no validation set beside it: "test", which
            leaves it alone and holds out a share of the training images, or "val". "unused":
            validation is held out of the training images, and no other set is opened.
        exif_orientation: turn each photograph upright as its EXIF entry says.
        max_train_samples: training images that are taken, after the split; None is all.
        max_val_samples: likewise of validation.
        decodes_test: read a test set of small images into memory, as its user needs it.
    """

    val_fraction: float = 0.2
    seed: int = 0
    test_split: str = AS_TEST
    exif_orientation: bool = True
    max_train_samples: int | None = None
    max_val_samples: int | None = None
    decodes_test: bool = True


class Sets(NamedTuple):
    """The images of a source, and in words where the validation set comes from."""

    train: ImageArray | ImageFiles
    val: ImageArray | ImageFiles
    how: str
    test: ImageArray | ImageFiles | None = None


def some(names: Iterable[str]) -> str:
    """The first names in quotation marks, on one line, and how many there are besides.

    >>> some(["a", "b"]), some(map(str, range(7)))
    ("'a', 'b'", "'0', '1', '2', '3', '4' and 2 more")
    """
    named = list(names)
    more = len(named) - MOST_NAMED
    listed = ", ".join(f"'{one_line(name)}'" for name in named[:MOST_NAMED])
    return f"{listed} and {more} more" if more > 0 else listed


def divided(parts: Mapping[str, ImageFiles], wanted: Opening, *, hashed: str = "file name") -> Sets:
    """The sets of a source whose images bear the names "train", "val" and "test".

    Without "val" a share of the training images is held out, unless "test" is to take its place.

    Args:
        parts: the images by these names; "train" is there.
        wanted: how they are to be split.
        hashed: the thing that `names` are, in words.
    """
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if wanted.test_split == AS_UNUSED:
        val = test = None
    word = "val"
    if val is None and wanted.test_split == AS_VAL:
        val, test, word = test, None, "test"
    if val is not None:
        return Sets(train, val, f"validation from its split {word}", test)
    rows, held_out = split_by_hash(
        train.names,
        train.labels,
        classes=train.classes,
        val_fraction=wanted.val_fraction,
        seed=wanted.seed,
    )
    return Sets(train.only(rows), train.only(held_out), f"{SPLIT} of the {hashed}", test)
