"""Decoded images kept in memory that all workers and ranks of a machine share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lbaccel.data.shared_bytes import TOKEN, SharedBytes
from lbaccel.errors import InputError, check_whole

_ROW = 3  # int64 of an image: its place + 1, its height, its width; 0 is no image
_BEING_WRITTEN = -1  # in the place of a row
_ALIGNED = 64  # bytes of a line of the processor's cache


class Held(NamedTuple):
    """Images whose pixels are kept, and the bytes of these."""

    num_images: int
    num_bytes: int


class PixelCache:
    """The pixels of images, uint8 [3, H, W] each, kept from their first decoding on.

    Image n is kept where 3 H W bytes are left of `num_bytes`, and is never given up: in a random
    order over more images than fit, an image that makes room for another one is as likely to be the
    next as that one. All processes that have the cache read and fill the same memory, so it does
    not matter which worker or rank an image goes to, and the bound is one for all of them. It also
    holds the index, 24 bytes an image. A process that is killed while it writes leaves an image
    that counts as absent, and the others go on.

    Args:
        num_images: images that may be asked for.
        num_bytes: most that is kept.

    Raises:
        InputError: no whole numbers, or the index has no room in `num_bytes`.

    >>> cache = PixelCache(2, 10_000)
    >>> first = cache.pixels(1, lambda: torch.full((3, 4, 5), 7, dtype=torch.uint8))
    >>> again = cache.pixels(1, lambda: 1 / 0)
    >>> torch.equal(first, again), cache.held()
    (True, Held(num_images=1, num_bytes=60))
    """

    def __init__(self, num_images: int, num_bytes: int) -> None:
        check_whole("num_images", num_images)
        check_whole("num_bytes", num_bytes)
        least = TOKEN + _start(num_images)
        if num_bytes < least:
            raise InputError(
                f"num_bytes={num_bytes:,} has no room for the index of {num_images:,} images, "
                f"which has {least:,} bytes. Use num_bytes >= {least:,}, and room for images."
            )
        self.num_images = num_images
        self._take(SharedBytes(num_bytes))

    @classmethod
    def of(cls, memory: SharedBytes, num_images: int) -> PixelCache:
        """The cache in memory in which another process has made it."""
        found = cls.__new__(cls)
        found.num_images = num_images
        found._take(memory)
        return found

    def pixels(self, index: int, decode: Callable[[], Tensor]) -> Tensor:
        """The pixels of an image, uint8 [3, H, W]: the kept ones, or those that `decode` makes.

        Only to be read: they are the cache's own memory, or `decode`'s.
        """
        kept = self._kept(index)
        if kept is not None:
            return kept
        pixels = decode()
        place = self._reserved(index, pixels)
        if place is not None:
            self._view(place, *pixels.shape[1:]).copy_(pixels)
            self._publish(index, place, pixels)
        return pixels

    def held(self) -> Held:
        """The number and the bytes of the images that are kept now."""
        with self.memory.locked():
            rows = self._index[self._index[:, 0] > 0]
        return Held(len(rows), int(3 * (rows[:, 1] * rows[:, 2]).sum()))

    def _take(self, memory: SharedBytes) -> None:
        self.memory = memory
        numbers = memory.bytes[: 8 * (1 + _ROW * self.num_images)].view(torch.int64)
        self._used = numbers[:1]  # bytes behind the index
        self._index = numbers[1:].view(self.num_images, _ROW)
        self._images = memory.bytes[_start(self.num_images) :]

    def _kept(self, index: int) -> Tensor | None:
        with self.memory.locked():  # else a processor may show a row before its pixels
            place, height, width = self._index[index].tolist()
        return self._view(place - 1, height, width) if place > 0 else None

    def _view(self, place: int, height: int, width: int) -> Tensor:
        flat = self._images[place : place + 3 * height * width]
        return flat.view(height, width, 3).permute(2, 0, 1)

    def _reserved(self, index: int, pixels: Tensor) -> int | None:
        """A place for pixels of this size; None: it has one already, or there is no room."""
        size = -(-pixels.numel() // _ALIGNED) * _ALIGNED
        with self.memory.locked():
            place = int(self._used)
            if self._index[index, 0] != 0 or place + size > len(self._images):
                return None
            self._used += size
            self._index[index, 0] = _BEING_WRITTEN
        return place

    def _publish(self, index: int, place: int, pixels: Tensor) -> None:
        row = torch.tensor([place + 1, *pixels.shape[1:]])
        with self.memory.locked():
            self._index[index] = row

    def __getstate__(self) -> tuple[SharedBytes, int]:
        return self.memory, self.num_images

    def __setstate__(self, state: tuple[SharedBytes, int]) -> None:
        memory, self.num_images = state
        self._take(memory)


@dataclass(frozen=True, eq=False)
class CachePart:
    """The images of one set in a cache of several: image n of the set is image `first` + n."""

    cache: PixelCache
    first: int = 0

    def pixels(self, index: int, decode: Callable[[], Tensor]) -> Tensor:
        """As `PixelCache.pixels`, of image `index` of the set."""
        return self.cache.pixels(self.first + index, decode)


def _start(num_images: int) -> int:
    """Bytes before those of images: a count and the index, aligned."""
    return -(-8 * (1 + _ROW * num_images) // _ALIGNED) * _ALIGNED
