"""Order and randomness keyed by sample: stateless functions of (seed, epoch, sample index)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lbaccel.randomness.keys import keyed_hash


@lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The permutation of `num_samples` indices in which `epoch` visits them.

    A function of (seed, epoch) alone: the same on every rank and for every plan.

    >>> sorted(epoch_order(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    keys = keyed_hash(seed, 0x0DE5, epoch, np.arange(num_samples))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def samples_at(
    start: int, count: int, *, num_samples: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices and epochs of the `count` samples from position `start` of the endless stream.

    Position p lies in epoch p // N at offset p mod N of that epoch's order.
    """
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, num_samples)
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), num_samples)[offsets[here]]
    return indices, epochs
