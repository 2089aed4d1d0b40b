"""A permutation as a function: its value at any place, in constant memory."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lbaccel.randomness.keys import hashed_on, keyed_hash

ROUNDS = 8  # 4 and 6 are seen to be too few in whole permutations (docs/results/order.md)


def keyed_permutation(places: ArrayLike, size: int, *key: int) -> NDArray[np.int64]:
    """The values at these places of the permutation of 0 ... size - 1 that the key names.

    A Feistel network over pairs. With a = ceil(sqrt(N)) and b = ceil(N / a), so that a b >= N, a
    place is x = b l + r with 0 <= l < a and 0 <= r < b. Round j = 0, 1, ... adds a hash of one half
    to the other half:

        l <- (l + h(key, j, r)) mod a    (j even)
        r <- (r + h(key, j, l)) mod b    (j odd)

    with h = `keyed_hash`. Each round has an inverse, so `ROUNDS` of them
    permute the a b pairs. Where the outcome b l + r is N or more, the rounds are run again on it
    until it is below N (cycle walking): this permutes the numbers below N. At most a - 1 pairs are
    not below N, about one in sqrt(N), so few places walk.

    Nothing is kept between calls. Time and memory depend on the number of places, not on N.

    Luby and Rackoff 1988 prove for random round functions that few values tell four rounds from a
    random permutation. An epoch shows all N values, where that proof is empty: the number of rounds
    is measured. Sizes of a few elements need more rounds than `ROUNDS`, and where a and b are odd
    with a b = N, no number of rounds gives an odd permutation.

    Args:
        places: whole numbers from 0 to size - 1, of any shape.
        size: N, at least 1.
        key: whole numbers; others give another permutation.

    Returns:
        int64 of the shape of `places`.

    Source:
        Luby and Rackoff 1988, "How to Construct Pseudorandom Permutations from Pseudorandom
        Functions"; Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking,
        and the network with halves of sizes a and b).

    >>> sorted(keyed_permutation(range(7), 7, 0, 3).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    rounds = keyed_hash(*key, np.arange(ROUNDS))
    given = np.asarray(places, np.int64)
    found = given.ravel().copy()
    walking = np.arange(found.size)
    while walking.size:
        left, right = np.divmod(found[walking], columns)
        for number, h in enumerate(rounds):
            if number % 2 == 0:
                left = (left + _below(rows, hashed_on(h, right))) % rows
            else:
                right = (right + _below(columns, hashed_on(h, left))) % columns
        found[walking] = left * columns + right
        walking = walking[found[walking] >= size]
    return found.reshape(given.shape)


def _below(bound: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Hashes as whole numbers below `bound`."""
    return (hashes % np.uint64(bound)).astype(np.int64)
