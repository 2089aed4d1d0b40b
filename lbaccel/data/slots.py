"""Batches of bytes on their way from a loader's workers: places in memory that are used again.

A batch in new shared memory costs a page fault for every 4 KiB, in the worker and in the main
process, which takes longer than the copy. The places of a worker are as many as it has batches at
once, and are written over when the main process is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from lbaccel.data.shared_bytes import TOKEN, SharedBytes
from lbaccel.errors import InputError

SHAPE = "__lbaccel_bytes__"  # of a data set whose `LOAD` fills bytes [n, *shape] that it is given
_EACH = 3  # of a worker: two that DataLoader has it make ahead, and the one that is read
_ALIGNED = 64


@dataclass(frozen=True)
class InSlot:
    """In the place of the bytes of a batch: which slot they are in, and their shape."""

    number: int
    shape: tuple[int, ...]


class Slots:
    """Places for batches of `num_bytes` each, three a worker.

    Args:
        num_workers: of the loader.
        num_bytes: of the largest batch; a larger one goes another way.

    Raises:
        InputError: the system gives no such memory.
    """

    def __init__(self, num_workers: int, num_bytes: int) -> None:
        self._size, self._count = -(-num_bytes // _ALIGNED) * _ALIGNED, _EACH * num_workers
        self._head = -(-self._count // _ALIGNED) * _ALIGNED
        self._memory = SharedBytes(TOKEN + self._head + self._count * self._size)

    def taken(self, shape: tuple[int, ...]) -> tuple[InSlot, Tensor] | None:
        """In a worker: a free place of its own, uint8 of this shape; None where there is none."""
        worker, length = get_worker_info(), math.prod(shape)
        if worker is None or length > self._size:
            return None
        busy = self._memory.bytes[: self._count]
        with self._memory.locked():
            for number in range(worker.id * _EACH, (worker.id + 1) * _EACH):
                if not busy[number]:
                    busy[number] = 1
                    slot = InSlot(number, shape)
                    return slot, self._bytes(slot)
        return None

    def opened(self, batches: Iterable[Any]) -> Iterator[Any]:
        """In the main process: each batch with its bytes, which are valid until the next one.

        A batch is a tuple whose first member may be an `InSlot` (a list, where DataLoader has
        pinned the others), or anything else, which passes.
        """
        for data in batches:
            slot = data[0] if isinstance(data, (tuple, list)) and data else None
            if not isinstance(slot, InSlot):
                yield data
                continue
            try:
                yield self._bytes(slot), *data[1:]
            finally:  # also where the pass is left here
                self.free(slot)

    def free(self, slot: InSlot) -> None:
        """Let its worker write over it."""
        with self._memory.locked():
            self._memory.bytes[slot.number] = 0

    def _bytes(self, slot: InSlot) -> Tensor:
        start = self._head + slot.number * self._size
        return self._memory.bytes[start : start + math.prod(slot.shape)].view(slot.shape)


def slots_for(shape: tuple[int, ...] | None, *, num_workers: int, batch_size: int) -> Slots | None:
    """Places for batches of samples of this shape of bytes; None: nothing would use them."""
    if shape is None or not num_workers:
        return None
    with suppress(InputError):  # another way there is always
        return Slots(num_workers, batch_size * math.prod(shape))
    return None


def loaded(load: Callable[..., Any], slots: Slots | None, shape: tuple[int, ...]) -> Any:
    """In a worker: what `load` makes, its bytes of this shape in a slot where one is free."""
    found = None if slots is None else slots.taken(shape)
    if slots is None or found is None:
        return load()
    slot, out = found
    try:
        _, *rest = load(out=out)
    except BaseException:
        slots.free(slot)
        raise
    return slot, *rest
