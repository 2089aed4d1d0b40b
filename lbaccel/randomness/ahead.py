"""Keys hashed ahead for a block of calls, and small masks made ahead for the next samples.

A micro-batch of a small network launches many kernels on few numbers, and each launch costs more
than its work. So keys are hashed for many calls and samples together; and where a sample's mask is
small, the mask of a call is made for all samples ahead, and a micro-batch takes its rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbaccel.randomness.draws import element_bits, first_bits, folded_elements, halves, keep_mask
from lbaccel.randomness.in_graph import Masked

# Elements of a call's mask: those of 64 calls take at most 16 MiB, until their update ends.
MASK_AHEAD = 2**16
ELEMENTS_AT_MOST = 2**20  # numbers of elements that are folded once: 4 MiB


class _Mask(NamedTuple):
    start: int  # sample of the block
    stop: int
    mask: Tensor  # [samples x rows of a sample, ...]


class KeysAhead:
    """The keys of a block of calls for the samples from `start` on, and masks made of them.

    Args:
        keys: int64 [calls, samples]; changed by nothing here.
        start: position of the first sample.
    """

    def __init__(self, keys: Tensor, start: int) -> None:
        self.start, self.count = start, keys.shape[1]
        self.low, self.high = halves(keys)
        self.first = first_bits(self.low, self.high)
        self._made: dict[Any, _Mask] = {}

    def of(self, start: int, count: int) -> KeysOf | None:
        """Those of `count` samples from a position on; None where they are not here."""
        skipped = start - self.start
        if skipped < 0 or skipped + count > self.count:
            return None
        low, high, first = (
            part[:, skipped : skipped + count] for part in (self.low, self.high, self.first)
        )
        return KeysOf(low, high, first, count, skipped, self)

    def make(
        self, row: int, shape: tuple[int, ...], keep: float, scale: float | None, *, ahead: slice
    ) -> Tensor:
        """The mask of a call for the samples `ahead`, in the shape of a sample's rows."""
        count = math.prod(shape)
        if count == 1:
            bits = self.first[row, ahead]
        else:
            bits = element_bits(self.low[row, ahead], self.high[row, ahead], count)
        mask = keep_mask(bits, keep).view(-1, *shape[1:])
        return mask if scale is None else mask * scale


class KeysOf(NamedTuple):
    """The keys of a micro-batch: int32 [calls, samples] each, as `Keys` has them."""

    low: Tensor
    high: Tensor
    first: Tensor
    samples: int
    skipped: int  # samples of the block before the first one
    block: KeysAhead

    def mask(
        self, row: int, x: Tensor | Masked, covered: int, *, keep: float, scale: float | None
    ) -> Tensor | None:
        """A call's mask, of those made ahead for more samples; None where it is too large.

        Args:
            row: of the call in its block.
            x: the first dimension holds the samples, the rows of each next to each other.
            covered: leading dimensions of `x` with draws of their own.
            keep: probability of True.
            scale: what the mask is multiplied by; None leaves it bool.

        Returns:
            [*x.shape[:covered], 1, ...], bool or of torch's default dtype.
        """
        shape, block, start = x.shape, self.block, self.skipped
        rows = shape[0] // self.samples
        of_sample = (rows, *shape[1:covered], *(1,) * (len(shape) - covered))
        stop, place = start + self.samples, (row, of_sample, keep, scale)
        made = block._made.get(place)
        if made is None or start < made.start or stop > made.stop:
            most = MASK_AHEAD // math.prod(of_sample)
            if most < 2 * self.samples:
                return None
            end = min(start + most, block.count)
            mask = block.make(row, of_sample, keep, scale, ahead=slice(start, end))
            made = block._made[place] = _Mask(start, end, mask)
        return made.mask[(start - made.start) * rows : (stop - made.start) * rows]


class Elements:
    """`folded_elements` of the largest call so far, for all calls of an update."""

    def __init__(self) -> None:
        self._table: Tensor | None = None

    def of(self, count: int, device: torch.device) -> Tensor | None:
        """Int32 [count]; None for one or for too many, which each call folds for itself."""
        if not 1 < count <= ELEMENTS_AT_MOST:
            return None
        table = self._table
        if table is None or table.shape[0] < count or table.device != device:
            table = self._table = folded_elements(count, device)
        return table[:count]

    def forget(self) -> None:
        """Give its memory back."""
        self._table = None
