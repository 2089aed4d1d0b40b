"""A part of a JPEG decoded at 1/2, 1/4 or 1/8 of its size, and never below what is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lbaccel.data.crops import Box, ResizedBox, cropped, scaled
from lbaccel.data.images import as_pixels

Wanted = Callable[[int, int], ResizedBox]  # the part of an image of this height and width
SMALLER = (8, 4, 2)  # libjpeg's denominators

# EXIF's orientation: whether rows and columns change places, and which of them are then turned
# round, that make [C, H, W] upright (CIPA DC-008, tag 274)
_UPRIGHT: Mapping[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels [C, H, W] as they are stored, upright."""
    swapped, flipped = _UPRIGHT.get(orientation, (False, ()))
    pixels = pixels.transpose(1, 2) if swapped else pixels
    return pixels.flip(flipped) if flipped else pixels


def denominator(part: ResizedBox) -> int:
    """The largest d of 8, 4, 2 and 1 with which the box has no fewer pixels than the result.

    That is floor(h / d) >= height and floor(w / d) >= width for a box of h x w. So the resize that
    follows makes the part smaller still, or leaves it as it is.

    >>> denominator(ResizedBox(Box(0, 0, 900, 1000), (224, 224)))
    4
    >>> denominator(ResizedBox(Box(0, 0, 447, 1000), (224, 224)))
    1
    """
    height, width = part.size
    enough = (d for d in SMALLER if part.box.height // d >= height and part.box.width // d >= width)
    return next(enough, 1)


def stored(box: Box, orientation: int, height: int, width: int) -> Box:
    """The box of an upright picture of this height and width, in the picture as it is stored.

    >>> stored(Box(0, 10, 20, 30), 6, 100, 200)  # its columns are the stored rows, from the last on
    Box(top=160, left=0, height=30, width=20)
    """
    swapped, flipped = _UPRIGHT.get(orientation, (False, ()))
    top, left, h, w = box
    top = height - top - h if 1 in flipped else top
    left = width - left - w if 2 in flipped else left
    return Box(left, top, w, h) if swapped else Box(top, left, h, w)


class Side(NamedTuple):
    """Pixels of one side of a smaller decoding, and how many of the result each becomes."""

    first: int
    num_pixels: int
    scale: float


def side_of(start: int, length: int, of_result: int, d: int, *, whole: int) -> Side:
    """The pixels of 1 / d for `length` pixels from `start` on, which become `of_result` pixels.

    Pixel i of 1 / d has the place of the pixels d i to d i + d - 1, so an edge at e lies at e / d.
    The first one is rounded to a whole number, halves upward, and lies lower where the last would
    be beyond the end. The scale is exact, so the part is moved by less than one pixel of 1 / d,
    mostly by no more than half of one, and is not stretched.

    Args:
        start, length: of the part, in pixels of the whole size.
        of_result: pixels that the part is resized to.
        d: the denominator.
        whole: pixels of the side.

    >>> side_of(4, 12, 3, 4, whole=20)[:2], side_of(6, 9, 2, 4, whole=15)[:2]
    ((1, 3), (1, 3))
    """
    num_pixels = -(-length // d)
    first = min((2 * start + d) // (2 * d), -(-whole // d) - num_pixels)
    # a little more, so that its product with `num_pixels` is not rounded below `of_result`
    return Side(first, num_pixels, math.nextafter(of_result * d / length, math.inf))


def drafted(
    picture: Image.Image, orientation: int, wanted: Wanted, *, interpolation: str
) -> tuple[Tensor, ResizedBox] | None:
    """A part of a JPEG out of a smaller decoding, resized, upright; None: no smaller one is enough.

    libjpeg leaves out the cosines of high frequency, so it makes nearly the mean of d x d pixels,
    in a part of the time (Pillow's `Image.draft`). `side_of` says how near a part is to its place;
    all of a picture has its place exactly.

    Args:
        picture: a JPEG of Pillow whose pixels are not decoded yet; they are then.
        orientation: of EXIF; 1 leaves the picture as it is stored.
        wanted: the part, of the height and width of the upright picture in its whole size.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 [3, height, width] of the size that the part is resized to; and the part.
    """
    swapped, _ = _UPRIGHT.get(orientation, (False, ()))
    width, height = picture.size[::-1] if swapped else picture.size
    part = wanted(height, width)
    d = denominator(part)
    if d == 1:
        return None
    of_stored = picture.height, picture.width
    box, size = stored(part.box, orientation, height, width), part.size
    out_h, out_w = size[::-1] if swapped else size
    rows = side_of(box.top, box.height, out_h, d, whole=of_stored[0])
    columns = side_of(box.left, box.width, out_w, d, whole=of_stored[1])
    picture.draft(None, (of_stored[1] // d, of_stored[0] // d))
    inside = Box(rows.first, columns.first, rows.num_pixels, columns.num_pixels)
    pixels = cropped(as_pixels(picture.convert("RGB")), inside)
    made = scaled(pixels, (rows.scale, columns.scale), interpolation=interpolation)
    return turned(made[:, :out_h, :out_w], orientation), part
