"""Order and randomness keyed by sample: stateless functions of (seed, epoch, sample index)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lbaccel.errors import InputError
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
    epochs, offsets = np.divmod(np.arange(start, start + count), num_samples)
    return _in_order(epochs, offsets, num_samples=num_samples, seed=seed), epochs


def repeated_at(
    update: tuple[int, int],
    start: int,
    count: int,
    *,
    num_samples: int,
    seed: int,
    repeats: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices and draws of samples of an update that holds each of its images `repeats` times.

    An update of b samples from position s on, with R = `repeats`, has G = ceil(b / R) images. Its
    sample i is copy c = i // G of image k = i mod G: copies of one image lie G samples apart, so no
    ghost batch of at most G samples holds an image twice. Image k stands at position s + k R of the
    stream, so in epoch e = (s + k R) // N, and it is the floor((s + k R - e N) / R)-th of that
    epoch's order: an epoch of N samples shows the first N / R images of a permutation of its own.

    Copy c draws its augmentation by the number e R + c in place of e: no two copies, of one epoch
    or of several, share a draw.

    Args:
        update: s and b. Where updates run over an epoch's end, s is a multiple of R.
        start: of the samples asked for, within the update.
        count: of them.
        num_samples: N.
        seed: of the order.
        repeats: R.

    Returns:
        Indices [count], and the numbers of their draws [count].

    >>> indices, draws = repeated_at((0, 6), 0, 6, num_samples=100, seed=0, repeats=3)
    >>> len(set(indices.tolist())), draws.tolist(), (indices[:2] == indices[4:]).tolist()
    (2, [0, 0, 1, 1, 2, 2], [True, True])
    """
    first, size = update
    copies, places = np.divmod(np.arange(start, start + count), -(-size // repeats))
    epochs, offsets = np.divmod(first + places * repeats, num_samples)
    indices = _in_order(epochs, offsets // repeats, num_samples=num_samples, seed=seed)
    return indices, epochs * repeats + copies


def _in_order(
    epochs: NDArray[np.int64], offsets: NDArray[np.int64], *, num_samples: int, seed: int
) -> NDArray[np.int64]:
    """The indices at these offsets of their epochs' orders."""
    indices = np.empty(len(epochs), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), num_samples)[offsets[here]]
    return indices


def check_repeats(repeats: int, sizes: Iterable[int], *, asked: str | None = None) -> None:
    """Stop where an update would not hold whole sets of copies.

    Args:
        repeats: copies of each image in an update.
        sizes: samples of full updates.
        asked: how the number was asked for, where that is not `repeats=`.

    Raises:
        InputError: a size that is no multiple; it names the nearest that are.
    """
    for size in sizes:
        if size % repeats:
            below, above = size // repeats * repeats, -(-size // repeats) * repeats
            near = f"{below} or {above}" if below else f"{above}"
            raise InputError(
                f"{asked or f'repeats={repeats}'} with an update of {size} samples: an update "
                f"holds each of its images {repeats} times, and {size} is no multiple of "
                f"{repeats}. Use a global batch of {near}, or repeats that divide {size}."
            )
