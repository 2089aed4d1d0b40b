"""Passes over batches that workers make; the workers and their memory stay from pass to pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lbaccel.data.loader import worker_options
from lbaccel.data.slots import Slots
from lbaccel.data.worker_side import as_it_is


class BatchPasses:
    """Batches of a data set, of lists of indices, as often as they are asked for.

    Args:
        dataset: gives the data set for the slots of its workers; `__getitems__` of it makes a whole
            batch.
        num_workers: processes that make them; they start with the first pass.
        slots: gives the places for bytes, or None.
    """

    def __init__(
        self,
        dataset: Callable[[Slots | None], Any],
        *,
        num_workers: int,
        slots: Callable[[], Slots | None],
    ) -> None:
        self._dataset, self._num_workers, self._new_slots = dataset, num_workers, slots
        self._asked: list[list[int]] = []
        self._loader: DataLoader[Any] | None = None
        self._slots: Slots | None = None
        self._under_way: Iterator[Any] = iter(())

    def __call__(self, batches: Iterable[list[int]]) -> Iterator[Any]:
        """The batches of these indices, in order; bytes in a slot are valid until the next one.

        A pass ends where another one begins.
        """
        self._drop_rest()
        if self._loader is None:
            self._slots = self._new_slots()  # none that a worker of before may write into
            self._loader = DataLoader(
                self._dataset(self._slots),
                batch_sampler=self._asked,
                num_workers=self._num_workers,
                persistent_workers=self._num_workers > 0,
                collate_fn=as_it_is,
                **worker_options(),
            )
        self._asked[:] = batches  # the sampler of the loader, which is read in this process
        self._under_way = iter(self._loader)
        return self._opened()

    def close(self) -> None:
        """End the workers now; another pass starts others."""
        self._loader, self._under_way = None, iter(())

    def _opened(self) -> Iterator[Any]:
        return self._under_way if self._slots is None else self._slots.opened(self._under_way)

    def _drop_rest(self) -> None:
        """Give back the slots of the batches that workers make of a pass that was left."""
        self._asked.clear()  # so they begin no more of it
        try:
            deque(self._opened(), maxlen=0)
        except Exception:  # of a batch that nobody reads
            self.close()
