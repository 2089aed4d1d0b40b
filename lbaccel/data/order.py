"""Order and randomness keyed by sample: stateless functions of (seed, epoch, sample index)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lbaccel.errors import InputError, brief
from lbaccel.randomness.keys import keyed_hash
from lbaccel.randomness.permutation import keyed_permutation

SORTED, COMPUTED = 1, 2
"""The rules of order. A run keeps the rule that it began with: its checkpoints hold the number.

SORTED sorts hashes of the N indices; all runs had it before there was a second rule. The whole
order stands in memory before the first sample: of 14 million, 2.4 s and 430 MiB at each epoch and
each resume.

COMPUTED is SORTED up to `MOST_SORTED` samples. Above it, `keyed_permutation` gives the index at a
place: no order is kept, and nothing is done before the first sample. One rule for every N would be
simpler and worse. The network does not give all orders of a tiny set alike. The sort costs a set
below the bound 0.1 s and 8 MiB an epoch, so a new order would buy nothing there, and would part
each new run from the older runs of its seed.
"""
MOST_SORTED = 2**20
_SORT, _NETWORK = 0x0DE5, 0x0DE6  # keys of the two, so that they share no draw


def check_order(order: object) -> int:
    """Let the number of a rule pass.

    Raises:
        InputError: no such rule.
    """
    if type(order) is not int or order not in (SORTED, COMPUTED):
        raise InputError(
            f"order={brief(order)}: the rules for the order of an epoch are {SORTED} (sorted) and "
            f"{COMPUTED} (computed). A state with another number is of a later lbaccel: go on with "
            "that one."
        )
    return order


def epoch_order(
    seed: int, epoch: int, num_samples: int, *, order: int = COMPUTED
) -> NDArray[np.int64]:
    """The permutation of `num_samples` indices in which `epoch` visits them, as a whole.

    A function of (seed, epoch) and the rule alone: the same on every rank and for every plan.

    >>> sorted(epoch_order(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    whole = np.arange(num_samples)
    return _at_places(whole, seed, epoch, num_samples=num_samples, order=order)


def _at_places(
    places: NDArray[np.int64], seed: int, epoch: int, *, num_samples: int, order: int
) -> NDArray[np.int64]:
    """The indices at these places of the order of an epoch."""
    if order == SORTED or num_samples <= MOST_SORTED:
        return _sorted_order(seed, epoch, num_samples)[places]
    return keyed_permutation(places, num_samples, seed, _NETWORK, epoch)


@lru_cache(maxsize=3)
def _sorted_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    keys = keyed_hash(seed, _SORT, epoch, np.arange(num_samples))
    return np.argsort(keys, kind="stable").astype(np.int64)


def samples_at(
    start: int, count: int, *, num_samples: int, seed: int, order: int = COMPUTED
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices and epochs of the `count` samples from position `start` of the endless stream.

    Position p lies in epoch p // N at offset p mod N of that epoch's order.

    Args:
        start: position of the first.
        count: of them.
        num_samples: N.
        seed: of the order.
        order: number of its rule.

    >>> indices, epochs = samples_at(3, 4, num_samples=5, seed=0)
    >>> epochs.tolist(), indices.shape
    ([0, 0, 1, 1], (4,))
    """
    epochs, offsets = np.divmod(np.arange(start, start + count), num_samples)
    return _in_order(epochs, offsets, num_samples=num_samples, seed=seed, order=order), epochs


def repeated_at(
    update: tuple[int, int],
    start: int,
    count: int,
    *,
    num_samples: int,
    seed: int,
    repeats: int,
    order: int = COMPUTED,
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
        order: number of its rule.

    Returns:
        Indices [count], and the numbers of their draws [count].

    >>> indices, draws = repeated_at((0, 6), 0, 6, num_samples=100, seed=0, repeats=3)
    >>> len(set(indices.tolist())), draws.tolist(), (indices[:2] == indices[4:]).tolist()
    (2, [0, 0, 1, 1, 2, 2], [True, True])
    """
    first, size = update
    copies, places = np.divmod(np.arange(start, start + count), -(-size // repeats))
    epochs, offsets = np.divmod(first + places * repeats, num_samples)
    indices = _in_order(epochs, offsets // repeats, num_samples=num_samples, seed=seed, order=order)
    return indices, epochs * repeats + copies


def _in_order(
    epochs: NDArray[np.int64],
    offsets: NDArray[np.int64],
    *,
    num_samples: int,
    seed: int,
    order: int,
) -> NDArray[np.int64]:
    """The indices at these offsets of their epochs' orders."""
    if len(epochs) and (epochs == epochs[0]).all():  # as nearly always
        epoch = int(epochs[0])
        return _at_places(offsets, seed, epoch, num_samples=num_samples, order=order)
    indices = np.empty(len(epochs), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _at_places(
            offsets[here], seed, int(epoch), num_samples=num_samples, order=order
        )
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
