"""Photographs a micro-batch at a time: decoded, cropped and resized as bytes, all draws keyed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbaccel.data import colour
from lbaccel.data.augment import BOX_X, byte_scale
from lbaccel.data.crops import (
    RATIO,
    SCALE,
    TRIES,
    Box,
    BoxDraws,
    centre,
    crop_box,
    cropped,
    erased_box,
    resized,
)
from lbaccel.data.decode import pixels_of
from lbaccel.data.images import ImageFiles
from lbaccel.errors import check_seed
from lbaccel.randomness.keys import keyed_hash, keyed_uniform

# One number for each kind of draw, as in `augment`; each is a column of `Photographs.draws`.
FIRST_DRAW = BOX_X + 1
(TOP, LEFT, FLIP, BRIGHTNESS, CONTRAST, SATURATION, ORDER, ERASED, ERASED_TOP, ERASED_LEFT) = range(
    10
)
AREAS, RATIOS, ERASED_AREAS, ERASED_RATIOS = (
    slice(start, start + TRIES) for start in range(10, 10 + 4 * TRIES, TRIES)
)
NUM_DRAWS = 10 + 4 * TRIES
NOISE = FIRST_DRAW + NUM_DRAWS


@dataclass(frozen=True)
class Photographs:
    """Images in files with timm's training augmentation, made a micro-batch at a time.

    Each image is decoded, cropped at random and resized to [3, img_size, img_size] bytes, mirrored
    with probability `flip`, changed in colour, and normalised: (x / 255 - mean) / std. With
    probability `random_erasing` a box of the result becomes normal noise. The draws have timm's
    distributions and depend on (seed, epoch, sample index) alone; those of a micro-batch are one
    call. An image is finished before the next is decoded: its floats stay in the cache of the
    processor, and nothing of one image can reach another.

    Args:
        source: the images.
        mean, std: of each channel, of 0..1.
        img_size: pixels a side.
        seed: of the draws.
        interpolation: "bilinear" or "bicubic".
        scale, ratio: bounds of the crop, see `crop_box`.
        flip: probability of a mirror image.
        color_jitter: s of the factors of brightness, contrast and saturation, which are uniform
            between max(0, 1 - s) and 1 + s; 0 is off.
        random_erasing: probability of the noise.
    """

    source: ImageFiles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int
    seed: int = 0
    interpolation: str = "bicubic"
    scale: tuple[float, ...] = SCALE
    ratio: tuple[float, ...] = RATIO
    flip: float = 0.5
    color_jitter: float = 0.4
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return byte_scale(self.mean, self.std)

    def load(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Float images [n, 3, img_size, img_size] and labels [n] of these samples.

        Raises:
            InputError: an image that can't be read.
        """
        images = torch.empty(len(indices), 3, self.img_size, self.img_size)
        keys = keyed_hash(self.seed, epochs, indices, NOISE)
        rows = zip(indices.tolist(), self.draws(indices, epochs).tolist(), keys, strict=True)
        for image, (index, draws, key) in zip(images, rows, strict=True):
            image.copy_(self._bytes(index, draws))
            self._finish_(image, draws, int(key))
        return images, _labels(self.source, indices.tolist())

    __lbaccel_load__ = load

    def draws(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Uniform numbers [n, NUM_DRAWS] in [0, 1), a row a sample."""
        kinds = FIRST_DRAW + np.arange(NUM_DRAWS)
        return keyed_uniform(self.seed, epochs[:, None], indices[:, None], kinds)

    def box(self, draws: Sequence[float], height: int, width: int) -> Box:
        """The crop of an image of this size."""
        of_box = BoxDraws(draws[AREAS], draws[RATIOS], draws[TOP], draws[LEFT])
        return crop_box(of_box, height, width, scale=self.scale, ratio=self.ratio)

    def factors(self, draws: Sequence[float]) -> list[float]:
        """Of brightness, contrast and saturation."""
        low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        return [low + draws[what] * (high - low) for what in (BRIGHTNESS, CONTRAST, SATURATION)]

    def _bytes(self, index: int, draws: Sequence[float]) -> Tensor:
        pixels = pixels_of(self.source, index)
        part = cropped(pixels, self.box(draws, *pixels.shape[1:]))
        size = self.img_size
        small = resized(part, size, size, interpolation=self.interpolation)
        return small.flip(2) if draws[FLIP] < self.flip else small

    def _finish_(self, image: Tensor, draws: Sequence[float], key: int) -> None:
        if self.color_jitter:
            order = colour.ORDERS[int(draws[ORDER] * len(colour.ORDERS))]
            colour.jitter_(image, self.factors(draws), order)
        _normalise_(image, self._scale)
        if draws[ERASED] < self.random_erasing:
            self._erase_(image, draws, key)

    def _erase_(self, image: Tensor, draws: Sequence[float], key: int) -> None:
        of_box = BoxDraws(
            draws[ERASED_AREAS], draws[ERASED_RATIOS], draws[ERASED_TOP], draws[ERASED_LEFT]
        )
        box = erased_box(of_box, *image.shape[1:])
        if box is not None:
            noise = torch.empty(len(image), box.height, box.width)
            noise.normal_(generator=torch.Generator().manual_seed(key))
            cropped(image, box).copy_(noise)


@dataclass(frozen=True)
class Centre:
    """Pixels of any size as evaluation sees them: see `centre`; then (x / 255 - mean) / std.

    Args:
        mean, std: of each channel, of 0..1.
        img_size: pixels a side.
        crop_pct: share of the image kept.
        interpolation: "bilinear" or "bicubic".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int
    crop_pct: float
    interpolation: str

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return byte_scale(self.mean, self.std)

    def __call__(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """Bytes [C, H, W] to floats [C, img_size, img_size], in `out` where it is given."""
        if out is None:
            out = torch.empty(len(pixels), self.img_size, self.img_size)
        options = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        out.copy_(centre(pixels, self.img_size, **options))
        return _normalise_(out, self._scale)


@dataclass(frozen=True)
class CentredPhotographs:
    """Images in files for evaluation."""

    source: ImageFiles
    centre: Centre

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Float images [n, 3, img_size, img_size] and labels [n] of these samples.

        Raises:
            InputError: an image that can't be read.
        """
        size = self.centre.img_size
        images = torch.empty(len(indices), 3, size, size)
        for image, index in zip(images, indices, strict=True):
            self.centre(pixels_of(self.source, index), image)
        return images, _labels(self.source, indices)


def _normalise_(image: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    mean, std = scale
    return image.sub_(mean[0]).div_(std[0])


def _labels(source: ImageFiles, indices: Sequence[int]) -> Tensor:
    return torch.tensor([int(source.labels[index]) for index in indices])
