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


class ResizedBox(NamedTuple):
    """A part of an image, and the height and width that it is resized to."""

    box: Box
    size: tuple[int, int]


def whole(height: int, width: int) -> ResizedBox:
    """All of an image, as it is."""
    return ResizedBox(Box(0, 0, height, width), (height, width))


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
    size = (height, width)
    return F.interpolate(_batch(pixels), size, mode=interpolation, antialias=True)[0]


def scaled(pixels: Tensor, scales: tuple[float, float], *, interpolation: str) -> Tensor:
    """The same by factors of height and width; a pixel of the result that is not whole is left out.

    Args:
        pixels: uint8 [C, H, W].
        scales: pixels of the result to one of these, which need not make a whole number of them.
        interpolation: "bilinear" or "bicubic".
    """
    batch = _batch(pixels)
    return F.interpolate(batch, scale_factor=scales, mode=interpolation, antialias=True)[0]


def _batch(pixels: Tensor) -> Tensor:
    rows = pixels.permute(1, 2, 0)
    if rows.is_contiguous():  # strides by which torch leaves the channels of the result together
        return rows[None].permute(0, 3, 1, 2)
    return pixels[None]


def centre_part(height: int, width: int, size: int, *, crop_pct: float) -> ResizedBox:
    """The part of an image that evaluation resizes, of which it takes the `middle`: timm's rule.

    The shorter side becomes floor(size / crop_pct) pixels, the longer one in proportion. Of a strip
    of more than `MOST_RATIO` only the middle is resized: the square lies inside it.

    >>> centre_part(300, 400, 224, crop_pct=0.875)
    ResizedBox(box=Box(top=0, left=0, height=300, width=400), size=(256, 341))
    """
    most = MOST_RATIO * min(height, width)
    h, w = min(height, most), min(width, most)
    box = Box((height - h) // 2, (width - w) // 2, h, w)
    short = math.floor(size / crop_pct)
    longer = int(short * max(h, w) / min(h, w))
    return ResizedBox(box, (longer, short) if h >= w else (short, longer))


def middle(pixels: Tensor, size: int) -> Tensor:
    """The square in the middle of pixels [C, H, W], which it shares the memory with."""
    height, width = pixels.shape[1:]
    return cropped(pixels, Box(round((height - size) / 2), round((width - size) / 2), size, size))


def centre(pixels: Tensor, size: int, *, crop_pct: float, interpolation: str) -> Tensor:
    """The middle of an image as evaluation sees it, uint8 [C, size, size]: see `centre_part`."""
    height, width = pixels.shape[1:]
    part = centre_part(height, width, size, crop_pct=crop_pct)
    made = resized(cropped(pixels, part.box), *part.size, interpolation=interpolation)
    return middle(made, size)
