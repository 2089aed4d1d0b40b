"""How long a run is: by its epochs, by AdaScale's gain, or by `--max-updates`."""

from __future__ import annotations

import math
from typing import Protocol

from lbaccel.batch.stream import UpdateStream


class _Loader(Protocol):
    @property
    def stream(self) -> UpdateStream: ...


class _Gaining(Protocol):
    """A rule that measures how far an update brings the run, as AdaScale does."""

    @property
    def finished(self) -> bool: ...

    @property
    def num_updates(self) -> int: ...

    @property
    def most_updates(self) -> int: ...


class Length:
    """The number of updates of a run, computed anew each time: a growing batch makes it smaller.

    Args:
        loader: its `stream` says where updates lie.
        epochs: passes over the training set.
        max_updates: an end before that of the epochs.
        gaining: AdaScale's scheduler, which ends the run when its gains add up to it.
        base_batch_size: of `gaining`, whose updates are worth one of this batch at least.
    """

    def __init__(
        self,
        loader: _Loader,
        *,
        epochs: float,
        max_updates: int | None = None,
        gaining: _Gaining | None = None,
        base_batch_size: int = 1,
    ) -> None:
        self._loader, self._epochs = loader, epochs
        self._limit = math.inf if max_updates is None else max_updates
        self._gaining, self._base = gaining, base_batch_size

    @property
    def planned(self) -> int:
        """Updates of all epochs, as far as it is known."""
        stream = self._loader.stream
        num_updates = stream.num_updates(self._epochs)
        if self._gaining is None:
            return num_updates
        if self._gaining.finished:
            return self._gaining.num_updates
        most = -(-num_updates * stream.global_batch_size // self._base)
        return max(most, self._gaining.most_updates)  # dropped updates gain nothing

    @property
    def stop_at(self) -> int:
        """The last update."""
        return int(min(self.planned, self._limit))

    def samples_before(self, update: int) -> int:
        """Samples of the first `update` updates."""
        return self._loader.stream.samples_seen(update)

    def limit(self, num_updates: int) -> None:
        """End the run after so many updates, if not before."""
        self._limit = min(self._limit, num_updates)
