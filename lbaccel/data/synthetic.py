"""Images that are made up: for trying out and for measuring, with classes that can be learnt."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.opening import Opening, Sets
from lbaccel.errors import InputError

CLASSES, SIZE = 10, 32  # where no numbers are given
OF_A_CLASS = (100, 20)  # training and validation images
MOST_CLASSES, SIZES = 10_000, (8, 1024)
MOST_BYTES = 256 * 2**20  # in memory: larger sets are drawn when they are asked for
_GRID = 4  # cells a side of the pattern that tells a class
_SHARE = 96  # of 256: the pattern's part in a pixel; the rest is noise
_PATTERNS = 2**63  # above any image's number: a stream of their own


def open_synthetic(size: str, wanted: Opening) -> Sets:
    """100 training and 20 validation images of each class, the same on every machine.

    A class has a pattern of 4 x 4 coloured squares; an image is 3/8 pattern and 5/8 noise of its
    own. The images lie in memory where they are small (at most 64 pixels a side and 256 MiB), else
    they are drawn as they are asked for.

    Args:
        size: such as "10x32", classes and pixels a side; that is also what "" means.
        wanted: not read, as nothing is held out and nothing was photographed.

    Raises:
        InputError: no such numbers, or numbers out of the bounds.
    """
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", size or f"{CLASSES}x{SIZE}")
    classes, side = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (2 <= classes <= MOST_CLASSES and SIZES[0] <= side <= SIZES[1]):
        raise InputError(
            f"synthetic:{size} is not CLASSESxSIZE of 2 to {MOST_CLASSES:,} classes and "
            f"{SIZES[0]} to {SIZES[1]:,} pixels a side. Use synthetic:{CLASSES}x{SIZE}."
        )
    names = tuple(f"class {number}" for number in range(classes))
    count = sum(OF_A_CLASS) * classes
    in_memory = side <= 64 and count * 3 * side * side <= MOST_BYTES
    make = _array if in_memory else _files
    last = OF_A_CLASS[0] * classes
    train, val = (make(rows, names, side) for rows in (range(last), range(last, count)))
    return Sets(train, val, "made up")


def pixels_of(row: int, *, classes: int, side: int) -> NDArray[np.uint8]:
    """The image of this number, [side, side, 3]; its class is row modulo `classes`.

    >>> pixels_of(3, classes=10, side=8).shape
    (8, 8, 3)
    """
    cell = np.arange(side) * _GRID // side
    pattern = _bytes(_PATTERNS + row % classes, _GRID * _GRID * 3).reshape(_GRID, _GRID, 3)
    noise = _bytes(row, side * side * 3).reshape(side, side, 3).astype(np.uint16)
    shown = pattern[cell][:, cell].astype(np.uint16)
    return ((_SHARE * shown + (256 - _SHARE) * noise) // 256).astype(np.uint8)


def draw(row: int, *, classes: int, side: int) -> Image.Image:
    """`pixels_of` as an image."""
    return Image.fromarray(pixels_of(row, classes=classes, side=side))


def _bytes(stream: int, count: int) -> NDArray[np.uint8]:
    raw = np.random.Philox(key=stream).random_raw(-(-count // 8))
    return np.asarray(raw, dtype="<u8").view(np.uint8)[:count]


def _array(rows: range, names: tuple[str, ...], side: int) -> ImageArray:
    images = np.stack([pixels_of(row, classes=len(names), side=side) for row in rows])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageArray(pixels, torch.tensor([row % len(names) for row in rows]), names)


def _files(rows: range, names: tuple[str, ...], side: int) -> ImageFiles:
    labels = tuple(row % len(names) for row in rows)
    read = partial(draw, classes=len(names), side=side)
    return ImageFiles(tuple(rows), labels, names, tuple(map(str, rows)), read)
