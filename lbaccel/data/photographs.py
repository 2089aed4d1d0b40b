"""Photographs a micro-batch at a time: decoded, cropped and resized as bytes, all draws keyed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

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
    ResizedBox,
    centre,
    centre_part,
    crop_box,
    cropped,
    erased_box,
    middle,
    resized,
)
from lbaccel.data.decode import check_kept, part_of, pixels_of
from lbaccel.data.draft import Wanted
from lbaccel.data.images import ImageFiles
from lbaccel.data.pixel_cache import CachePart
from lbaccel.data.reused import ReusedMemory
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

_FLOATS = ReusedMemory()  # of this process: training and evaluation take turns


@dataclass(frozen=True)
class Photographs:
    """Images in files with timm's training augmentation, made a micro-batch at a time.

    Each image is decoded, cropped at random and resized to [3, img_size, img_size] bytes, mirrored
    with probability `flip`, and changed in colour. That is done where images are read, in the
    loader's workers, which hand on bytes. The main process normalises: (x / 255 - mean) / std, and
    with probability `random_erasing` a box of the result becomes normal noise. The draws have
    timm's distributions and depend on (seed, epoch, sample index) alone; those of a micro-batch are
    one call. Each image goes through all of it alone: its floats stay in the cache of the
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
        cache: keeps decoded images; it changes no pixel.
        draft: decode a JPEG at a smaller size where the crop has its pixels still. The crop is
            drawn in the pixels of the whole image, so it is the same part of it.

    Raises:
        InputError: `draft` beside a `cache`.
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
    cache: CachePart | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_kept(draft=self.draft, cache=self.cache)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return byte_scale(self.mean, self.std)

    def load(
        self,
        indices: NDArray[np.int64],
        epochs: NDArray[np.int64],
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Bytes [n, 3, img_size, img_size] and labels [n] of these samples, as far as bytes go.

        Args:
            indices, epochs: of the samples.
            out: memory for the bytes.

        Raises:
            InputError: an image that can't be read.
        """
        if out is None:
            out = torch.empty(len(indices), *self.bytes_shape, dtype=torch.uint8)
        floats = torch.empty(4, self.img_size, self.img_size)
        rows = zip(out, indices.tolist(), self.draws(indices, epochs).tolist(), strict=True)
        for image, index, draws in rows:
            self._fill(image, index, draws, floats)
        return out, torch.tensor([int(self.source.labels[index]) for index in indices.tolist()])

    @property
    def bytes_shape(self) -> tuple[int, int, int]:
        """Of a sample of `load`."""
        return 3, self.img_size, self.img_size

    def finish(
        self, data: tuple[Tensor, Tensor], indices: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Float images [n, 3, img_size, img_size] and labels [n] of what `load` gave."""
        images, labels = data
        floats = normalised(images, self._scale, pinned=torch.cuda.is_available())
        if self.random_erasing:
            keys = keyed_hash(self.seed, epochs, indices, NOISE)
            rows = zip(floats, self.draws(indices, epochs).tolist(), keys, strict=True)
            for image, draws, key in rows:
                if draws[ERASED] < self.random_erasing:
                    self._erase_(image, draws, int(key))
        return floats, labels

    __lbaccel_load__ = load
    __lbaccel_bytes__ = bytes_shape
    __lbaccel_finish__ = finish

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

    def _fill(self, image: Tensor, index: int, draws: Sequence[float], floats: Tensor) -> None:
        """Write a sample's bytes; `floats` [4, ...] is room to work in, which the cache holds."""
        size = self.img_size

        def crop(height: int, width: int) -> ResizedBox:
            return ResizedBox(self.box(draws, height, width), (size, size))

        made = _resized_part(self, self.source, index, crop, cache=self.cache)
        if draws[FLIP] < self.flip:
            made = made.flip(2)
        if not self.color_jitter:
            image.copy_(made)
            return
        order = colour.ORDERS[int(draws[ORDER] * len(colour.ORDERS))]
        whole, room = floats[:3].copy_(made), floats[3]
        colour.jitter_(whole, self.factors(draws), order, room=room)
        colour.to_bytes_(image, whole)

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
    """Pixels of any size as evaluation sees them: see `centre_part`; then (x / 255 - mean) / std.

    Args:
        mean, std: of each channel, of 0..1.
        img_size: pixels a side.
        crop_pct: share of the image kept.
        interpolation: "bilinear" or "bicubic".
        draft: see `Photographs`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int
    crop_pct: float
    interpolation: str
    draft: bool = False

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return byte_scale(self.mean, self.std)

    def part(self, height: int, width: int) -> ResizedBox:
        """Of an image of this size: what is resized, before its middle is cut out."""
        return centre_part(height, width, self.img_size, crop_pct=self.crop_pct)

    def cut(self, pixels: Tensor) -> Tensor:
        """Bytes [C, H, W] to bytes [C, img_size, img_size]."""
        options = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        return centre(pixels, self.img_size, **options)

    def read(self, source: ImageFiles, index: int, *, cache: CachePart | None = None) -> Tensor:
        """Bytes [3, img_size, img_size] of a sample.

        Raises:
            InputError: an image that can't be read, or a `cache` beside `draft`.
        """
        check_kept(draft=self.draft, cache=cache)
        return middle(_resized_part(self, source, index, self.part, cache=cache), self.img_size)

    @property
    def bytes_shape(self) -> tuple[int, int, int]:
        """Of a sample of `load`."""
        return 3, self.img_size, self.img_size

    def load(
        self,
        source: ImageFiles,
        indices: Sequence[int],
        *,
        cache: CachePart | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Bytes [n, 3, img_size, img_size] and labels [n] of these samples.

        Args:
            source, indices: the samples.
            cache: keeps decoded images.
            out: memory for the bytes.

        Raises:
            InputError: an image that can't be read.
        """
        if out is None:
            out = torch.empty(len(indices), *self.bytes_shape, dtype=torch.uint8)
        for image, index in zip(out, indices, strict=True):
            image.copy_(self.read(source, index, cache=cache))
        return out, torch.tensor([int(source.labels[index]) for index in indices])

    def finish(self, images: Tensor, *, pinned: bool = False) -> Tensor:
        """Bytes [n, C, img_size, img_size] normalised; `pinned`: in pinned memory."""
        return normalised(images, self._scale, pinned=pinned)


def _resized_part(
    how: Photographs | Centre,
    source: ImageFiles,
    index: int,
    wanted: Wanted,
    *,
    cache: CachePart | None,
) -> Tensor:
    """The part of a sample that `wanted` names, as bytes of the size that it names."""
    if cache is None:
        draft = how.interpolation if how.draft else None
        pixels, part = part_of(source, index, wanted, draft=draft)
    else:
        pixels = cache.pixels(index, partial(pixels_of, source, index))
        part = wanted(*pixels.shape[1:])
        pixels = cropped(pixels, part.box)
    return resized(pixels, *part.size, interpolation=how.interpolation)


def normalised(images: Tensor, scale: tuple[Tensor, Tensor], *, pinned: bool) -> Tensor:
    """Bytes [n, C, H, W] less the mean and over the deviation of `byte_scale`, an image at a time.

    Args:
        images: uint8.
        scale: of `byte_scale`.
        pinned: whether the result is in pinned memory.
    """
    mean, std = scale
    floats = torch.empty(images.shape, pin_memory=True) if pinned else _FLOATS.empty(images.shape)
    for one, image in zip(floats, images, strict=True):
        one.copy_(image).sub_(mean[0]).div_(std[0])
    return floats
