"""Order and randomness keyed by sample: stateless functions of (seed, epoch, sample index)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_hash(*parts: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of integers, elementwise over broadcast arrays; no state, no order.

    SplitMix64's finaliser (Steele, Lea and Flood 2014, section 5) chained over the parts:
    h <- mix((h + part + 1) * golden).

    >>> bool(keyed_hash(1, 2) == keyed_hash(1, np.array([0, 2]))[1])
    True
    """
    with np.errstate(over="ignore"):
        h = np.zeros((), np.uint64)
        for part in parts:
            value = np.asarray(part).astype(np.int64).view(np.uint64)
            h = (h + value + np.uint64(1)) * _GOLDEN
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def keyed_uniform(*parts: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from `keyed_hash`: its upper 53 bits over 2^53."""
    return (keyed_hash(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


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
