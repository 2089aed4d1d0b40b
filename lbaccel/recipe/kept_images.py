"""`--cache-images`: decoded images in memory that the workers and ranks of a machine share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lbaccel.data.pixel_cache import CachePart, PixelCache
from lbaccel.data.shared_bytes import SharedBytes
from lbaccel.data.sources import Source
from lbaccel.errors import InputError
from lbaccel.host_memory import host_memory
from lbaccel.runs.ranks import on_each_rank
from lbaccel.update.memory.budget import parse_memory

GIB = 2**30


@dataclass
class KeptImages:
    """The cache of a run: its training images, and its validation images behind them.

    Args:
        cache: of all of them.
        num_training: images of the training set.
    """

    cache: PixelCache
    num_training: int
    _epochs_begun: int = 0

    @property
    def training(self) -> CachePart:
        """The part of the training set."""
        return CachePart(self.cache)

    @property
    def validation(self) -> CachePart:
        """The part of the evaluations."""
        return CachePart(self.cache, first=self.num_training)

    def before_epoch(self) -> str | None:
        """A line on the images kept, once: when each training image may have been decoded."""
        self._epochs_begun += 1
        return self.in_words() if self._epochs_begun == 2 else None

    def in_words(self) -> str:
        """A line on the images that are kept now."""
        held, of_all = self.cache.held(), self.cache.num_images
        return (
            f"cache: {held.num_images:,} of {of_all:,} images ({_pct(held.num_images, of_all)}) "
            f"are kept decoded, in {held.num_bytes / GIB:.3g} GiB"
            + ("" if held.num_images == of_all else "; the others are decoded each time")
        )


def kept_images(
    asked: str | None, source: Source, accelerator: Any, *, say: Callable[[str], object]
) -> KeptImages | None:
    """The cache of a run, one for all ranks of a machine; None where none was asked for.

    The first rank of each machine makes it, and the others open it; a collective.

    Args:
        asked: `--cache-images`.
        source: its training and validation images.
        accelerator: of all ranks.
        say: prints a line.

    Raises:
        InputError: no size, more than is free, or less than the index of the images has.
    """
    if asked is None:
        return None
    num_images = len(source.train) + len(source.val)
    rank, local = accelerator.process_index, accelerator.local_process_index
    made = on_each_rank(accelerator, lambda: None if local else _made(asked, num_images))
    if accelerator.num_processes > 1:
        addresses: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(addresses, None if made is None else made.memory.address)
        first = addresses[rank - local]
        made = on_each_rank(
            accelerator, lambda: made or PixelCache.of(SharedBytes.at(first), num_images)
        )
    assert made is not None
    say(
        f"cache: decoded images are kept in at most {parse_memory(asked) / GIB:.3g} GiB of this "
        "machine's memory, which its ranks and their workers share"
    )
    return KeptImages(made, len(source.train))


def _made(asked: str, num_images: int) -> PixelCache:
    num_bytes, (free, _) = parse_memory(asked), host_memory()
    if num_bytes > free:
        raise InputError(
            f"--cache-images {asked}: {free / GIB:.2f} GiB of this machine's memory are free. Use "
            f"--cache-images {int(free / 2 / 2**20)}MiB, or leave it out."
        )
    try:
        return PixelCache(num_images, num_bytes)
    except InputError as error:
        raise InputError(f"--cache-images {asked}: {error}") from error


def _pct(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %"
