"""Vectorised augmentation of images in memory, and mixing within groups: all keyed by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from lbaccel.batch.plan import MicroBatch
from lbaccel.data.sources import ImageArray
from lbaccel.errors import InputError, check_choice, check_seed
from lbaccel.randomness.keys import keyed_uniform

# One number for each kind of draw, so that no two share a hash.
CROP_Y, CROP_X, FLIP, MIX_LAMBDA, MIX_CHOICE, BOX_Y, BOX_X = range(1, 8)

PADDINGS = ("zero", "grey", "reflect")
GREY = 127  # of 255


def byte_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of bytes, [1, C, 1, 1] each, of those of pixels of 0..1."""
    of_mean, of_std = (torch.tensor(x).view(1, -1, 1, 1) * 255 for x in (mean, std))
    return of_mean, of_std


@dataclass(frozen=True)
class KeyedImages:
    """A set of small images in memory that is augmented a micro-batch at a time.

    Each image of [C, H, W] bytes is shifted by a random crop of its frame, which is padded by `pad`
    pixels a side (`padding`: zero is black, grey is 127, reflect is the image's own mirror image),
    mirrored with probability `flip`, resized to `img_size` and normalised: (x / 255 - mean) / std.
    The draws depend on (seed, epoch, sample index) alone.
    """

    source: ImageArray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int = 0
    pad: int = 0
    flip: float = 0.0
    img_size: int | None = None
    interpolation: str = "bicubic"
    padding: str = "zero"

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_choice("padding", self.padding, choices=PADDINGS)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return byte_scale(self.mean, self.std)

    def fetch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Float images [n, C, img_size, img_size] and labels [n] of these samples."""
        rows = torch.from_numpy(np.ascontiguousarray(indices))
        images = self.source.images.index_select(0, rows)
        if self.pad:
            images = self._crop(images, indices, epochs)
        if self.flip:
            mirrored = keyed_uniform(self.seed, epochs, indices, FLIP) < self.flip
            pixels = images.numpy()
            pixels[mirrored] = pixels[mirrored, :, :, ::-1]
        return self.normalise(images), self.source.labels[rows]

    __lbaccel_fetch__ = fetch

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes [n, C, H, W] to normalised floats of `img_size`."""
        x = images.float()
        if self.img_size is not None and self.img_size != x.shape[-1]:
            x = F.interpolate(
                x,
                size=(self.img_size, self.img_size),
                mode=self.interpolation,
                antialias=self.interpolation in ("bilinear", "bicubic"),
            ).clamp_(0, 255)
        mean, std = self._scale
        return x.sub_(mean).div_(std)

    def _crop(self, images: Tensor, indices: NDArray[Any], epochs: NDArray[Any]) -> Tensor:
        size, span = images.shape[2:], 2 * self.pad + 1
        top, left = (
            (keyed_uniform(self.seed, epochs, indices, draw) * span).astype(int)
            for draw in (CROP_Y, CROP_X)
        )
        if self.padding == "reflect":
            for dim, length in zip((2, 3), size, strict=True):
                images = images.index_select(dim, _reflected(length, self.pad))
        else:
            images = F.pad(images, [self.pad] * 4, value=GREY if self.padding == "grey" else 0)
        windows = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, axis=(2, 3))
        return torch.from_numpy(windows[np.arange(len(images)), :, top, left])


def _reflected(length: int, pad: int) -> Tensor:
    """Places -pad .. length + pad - 1, those outside of 0 .. length - 1 as their mirror image.

    The mirror is the border, whose row stands once.
    """
    last = length - 1
    places = torch.arange(-pad, length + pad)
    return (last - (last - places.abs()).abs()).clamp_(min=0)


@dataclass(frozen=True)
class GroupMix:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) within the groups of a micro-batch.

    Sample i of a group of g is mixed with sample g - 1 - i: x = lam x_i + (1 - lam) x_j, targets
    alike, lam ~ Beta(alpha, alpha) drawn for each sample by (seed, epoch, index). Groups are whole
    ghost batches or neighbouring pairs, so no partition of an update changes a partner. With both
    given, each sample takes CutMix with probability 1/2.

    Args:
        num_classes: length of the target vectors.
        mixup, cutmix: their alpha; 0 is off.
        label_smoothing: targets are 1 - s + s / C and s / C.
        seed: of the draws.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if min(self.mixup, self.cutmix) < 0 or not (self.mixup or self.cutmix):
            raise InputError(
                f"mixup={self.mixup} and cutmix={self.cutmix}: give at least one above 0."
            )

    def __call__(
        self,
        data: tuple[Tensor, Tensor],
        micro_batch: MicroBatch,
        indices: NDArray[np.int64],
        epochs: NDArray[np.int64],
    ) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] and labels [n] to mixed images and soft targets [n, num_classes]."""
        images, labels = data
        off = self.label_smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off)
        targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + off)
        partner = torch.cat(
            [
                torch.arange(start + size - 1, start - 1, -1)
                for start, size in zip(_starts(micro_batch), micro_batch.group_sizes, strict=True)
            ]
        )

        def uniform(draw: int) -> NDArray[np.float64]:
            return keyed_uniform(self.seed, epochs, indices, draw)

        if self.mixup and self.cutmix:
            cut = uniform(MIX_CHOICE) < 0.5
        else:
            cut = np.full(len(indices), bool(self.cutmix))
        u = uniform(MIX_LAMBDA)
        lam = np.where(
            cut,
            betaincinv(self.cutmix or 1, self.cutmix or 1, u),
            betaincinv(self.mixup or 1, self.mixup or 1, u),
        )
        height, width = images.shape[-2:]
        box, area = _boxes(lam, uniform(BOX_Y), uniform(BOX_X), height, width)
        lam = np.where(cut, 1 - area, lam)
        weight = torch.from_numpy(lam).float()
        keep = torch.where(
            torch.from_numpy(cut)[:, None, None], (~box).float(), weight[:, None, None]
        )[:, None]
        mixed = images * keep + images[partner] * (1 - keep)
        return mixed, targets * weight[:, None] + targets[partner] * (1 - weight[:, None])


def _starts(micro_batch: MicroBatch) -> list[int]:
    starts = [0]
    for size in micro_batch.group_sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _boxes(
    lam: NDArray[Any], u_y: NDArray[Any], u_x: NDArray[Any], height: int, width: int
) -> tuple[Tensor, NDArray[np.float64]]:
    """CutMix's boxes as masks [n, H, W], and the share of the image that each really covers."""
    half = np.sqrt(1 - lam) / 2

    def inside(u: NDArray[Any], length: int) -> NDArray[np.bool_]:
        low = np.clip(np.round((u - half) * length), 0, length)[:, None]
        high = np.clip(np.round((u + half) * length), 0, length)[:, None]
        at = np.arange(length)[None]
        return (low <= at) & (at < high)

    box = inside(u_y, height)[:, :, None] & inside(u_x, width)[:, None, :]
    return torch.from_numpy(box), box.mean((1, 2))
