"""The micro-batches of an update for two passes, read and decoded once where they may stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.host_memory import host_memory

MicroBatches = Iterable[tuple[MicroBatch, Any]]


class ReadTwice:
    """Makes an update's micro-batches for both passes, and reads them once where they may stay.

    They stay as they come from the loader, on the host, while they hold less than half of the
    memory that was free there. Above that they are let go, and made anew for the second pass.

    Args:
        make: the micro-batches of this rank, from the start.
        once: nothing makes them anew, so they stay in any case.
        sharers: processes that may share the host's memory.
    """

    def __init__(self, make: Callable[[], MicroBatches], *, once: bool, sharers: int = 1) -> None:
        self._make, self._once, self._sharers = make, once, sharers
        self._kept: list[tuple[Any, list[tuple[Tensor, int]]]] | None = None

    def __call__(self) -> Iterator[tuple[MicroBatch, Any]]:
        """The micro-batches: read the first time, and as they were kept the second."""
        if self._kept is None:
            yield from self._read()
            return
        kept, self._kept = self._kept, None
        for number, (pair, versions) in enumerate(kept):
            kept[number] = (None, [])  # each goes when it was used
            if any(tensor._version != version for tensor, version in versions):
                raise InputError(
                    "embed writes into the tensors of its micro-batch, and with embed= it sees "
                    "each twice. Let it make new ones: images = images - mean, in place of "
                    "images -= mean."
                )
            yield pair

    def _read(self) -> Iterator[tuple[MicroBatch, Any]]:
        kept: list[Any] | None = []
        room = float("inf") if self._once else free_host_bytes() / 2 / self._sharers
        for pair in self._make():
            if kept is not None:
                tensors = [t for t in tree_leaves(pair) if isinstance(t, Tensor)]
                room -= sum(t.nbytes for t in tensors)
                versions = [(t, t._version) for t in tensors if not t.is_inference()]
                kept.append((pair, versions))
                kept = None if room < 0 else kept
            yield pair
        self._kept = kept


def free_host_bytes() -> float:
    """Free memory of this machine; infinite where the system does not say."""
    try:
        return float(host_memory()[0])
    except InputError:
        return float("inf")
