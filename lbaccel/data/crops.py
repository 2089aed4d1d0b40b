"""Boxes of random crops and of random erasing out of draws, and a crop resized as bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

TRIES = 10  # that timm and torchvision give a box to fit
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # timm's and torchvision's bounds of a crop
ERASED_SCALE, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's bounds of an erased box
MOST_RATIO = 20  # of the longer side to the shorter: resized whole, a strip has no bound


class Box(NamedTuple):
    """A part of an image, in pixels from its upper left corner."""

    top: int
    left: int
    height: int
    width: int


class BoxDraws(NamedTuple):
    """Uniform numbers in [0, 1) for a box: of each try its area and ratio, and its place."""

    areas: Sequence[float]
    ratios: Sequence[float]
    top: float
    left: float


def crop_box(
    draws: BoxDraws, height: int, width: int, *, scale: Sequence[float], ratio: Sequence[float]
) -> Box:
    """The box of a random resized crop (Szegedy et al. 2015, section 6), as timm draws it.

    Its area is uniform between the shares `scale` of the image's, and the logarithm of its width /
    height is uniform between those of `ratio`. The first of `TRIES` boxes that fits is taken, at a
    uniform place. Where none fits it is the largest box in the middle that has the ratio nearest
    to the image's own.

    Args:
        draws: of this image.
        height, width: of the image, in pixels.
        scale: least and largest share of the area.
        ratio: least and largest width / height.

    >>> draws = BoxDraws([0.5] * TRIES, [0.5] * TRIES, 0.999, 0.0)
    >>> crop_box(draws, 100, 100, scale=(0.16, 0.34), ratio=(0.5, 2.0))
    Box(top=50, left=0, height=50, width=50)
    """
    for h, w in _sides(draws, height * width, scale, ratio):
        if 0 < h <= height and 0 < w <= width:
            return _placed(draws, h, w, height, width)
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def erased_box(draws: BoxDraws, height: int, width: int) -> Box | None:
    """The box that random erasing (Zhong et al. 2020) fills, as timm draws it; None: none fits."""
    for w, h in _sides(draws, height * width, ERASED_SCALE, ERASED_RATIO):  # height / width here
        if h < height and w < width:
            return _placed(draws, h, w, height, width)
    return None


def _sides(
    draws: BoxDraws, area: int, scale: Sequence[float], ratio: Sequence[float]
) -> Iterator[tuple[int, int]]:
    """Height and width of each try."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio in zip(draws.areas, draws.ratios, strict=True):
        target = area * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(low + u_ratio * (high - low))
        yield round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))


def _placed(draws: BoxDraws, h: int, w: int, height: int, width: int) -> Box:
    return Box(int(draws.top * (height - h + 1)), int(draws.left * (width - w + 1)), h, w)


def cropped(pixels: Tensor, box: Box) -> Tensor:
    """The box of pixels [C, H, W], which it shares the memory with."""
    rows, columns = (box.top, box.top + box.height), (box.left, box.left + box.width)
    return pixels[:, slice(*rows), slice(*columns)]


def resized(pixels: Tensor, height: int, width: int, *, interpolation: str) -> Tensor:
    """Bytes [C, H, W] at another size, antialiased, in the integer arithmetic that Pillow has.

    Args:
        pixels: uint8.
        height, width: of the result, in pixels.
        interpolation: "bilinear" or "bicubic".
    """
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode=interpolation, antialias=True)[0]


def centre(pixels: Tensor, size: int, *, crop_pct: float, interpolation: str) -> Tensor:
    """The middle of an image as evaluation sees it, uint8 [C, size, size]: timm's rule.

    The shorter side becomes floor(size / crop_pct) pixels, the longer one in proportion, and the
    square in the middle is cut out. Of a strip of more than `MOST_RATIO` only the middle is
    resized: the square lies inside it.
    """
    height, width = pixels.shape[1:]
    most = MOST_RATIO * min(height, width)
    h, w = min(height, most), min(width, most)
    pixels = cropped(pixels, Box((height - h) // 2, (width - w) // 2, h, w))
    short = math.floor(size / crop_pct)
    longer = int(short * max(h, w) / min(h, w))
    height, width = (longer, short) if h >= w else (short, longer)
    pixels = resized(pixels, height, width, interpolation=interpolation)
    return cropped(pixels, Box(round((height - size) / 2), round((width - size) / 2), size, size))
