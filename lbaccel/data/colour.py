"""Colour jitter of one image in place: Pillow's arithmetic on whole numbers held as floats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION)))
# ITU-R BT.601 in 16 bits behind the point, as Pillow has it: a sum of 24 bits, exact in float32
_RED, _GREEN, _BLUE = 19595 / 2**16, 38470 / 2**16, 7471 / 2**16


def grey(image: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The luma of whole numbers 0..255 [3, H, W], rounded: [H, W], in the memory of `out`."""
    red, green, blue = image
    luma = torch.mul(red, _RED, out=out)
    return luma.add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE).add_(0.5).floor_()


def jitter_(
    image: Tensor, factors: Sequence[float], order: Sequence[int], *, room: Tensor | None = None
) -> Tensor:
    """Brightness, contrast and saturation of an image, changed in place.

    Each is a blend t + f (x - t), cut off to 0..255 and then to whole numbers as Pillow does. Its t
    is black for brightness, the mean luma of this image for contrast, and the luma of each pixel
    for saturation. Every step is exact or rounded once, so the result is the same on each machine.

    Args:
        image: float32 [3, H, W], whole numbers 0..255.
        factors: f of brightness, contrast and saturation; 1 changes nothing.
        order: in which they are done, one of `ORDERS`.
        room: float32 [H, W] to work in; new memory for each luma takes longer than the luma.

    Returns:
        `image`.
    """
    for what in order:
        factor = factors[what]
        if what == BRIGHTNESS:
            image.mul_(factor)
        else:
            towards = grey(image, out=room)
            if what == CONTRAST:
                # whole numbers: exact in any order, and in float32 too where they fit
                exact = torch.float32 if 255 * towards.numel() <= 2**24 else torch.float64
                total = int(towards.sum(dtype=exact))
                mean = (2 * total + towards.numel()) // (2 * towards.numel())
                image.sub_(mean).mul_(factor).add_(mean)
            else:
                image.sub_(towards).mul_(factor).add_(towards)
        if factor > 1:  # else each number lies between t and x
            image.clamp_(0, 255)
        image.floor_()
    return image


def to_bytes_(out: Tensor, image: Tensor) -> None:
    """Write whole numbers 0..255, float32, as uint8: numpy is some six times as fast as torch."""
    np.copyto(out.numpy(), image.numpy(), casting="unsafe")
