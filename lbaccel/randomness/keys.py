"""Stateless randomness: hashes of integers in place of generators, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
_ALL = 2**64 - 1


def keyed_hash(*parts: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of integers, elementwise over broadcast arrays; no state, no order.

    SplitMix64's finaliser (Steele, Lea and Flood 2014, section 5) chained over the parts:
    h <- mix((h + part + 1) * golden).

    >>> bool(keyed_hash(1, 2) == keyed_hash(1, np.array([0, 2]))[1])
    True
    """
    h = np.zeros((), np.uint64)
    for part in parts:
        h = hashed_on(h, part)
    return h


def hashed_on(h: NDArray[np.uint64], part: ArrayLike) -> NDArray[np.uint64]:
    """`keyed_hash` of one part more, from its value of the parts before.

    >>> bool(hashed_on(keyed_hash(1, 2), 3) == keyed_hash(1, 2, 3))
    True
    """
    if not h.ndim and isinstance(part, int):  # numpy takes ten times as long for one number
        return np.uint64(_hashed_number(int(h), part))  # type: ignore[return-value]
    with np.errstate(over="ignore"):
        value = np.asarray(part).astype(np.int64).view(np.uint64)
        h = (h + value + np.uint64(1)) * np.uint64(GOLDEN)
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(multiplier)
    return h


def _hashed_number(h: int, part: int) -> int:
    """`hashed_on` of one number, modulo 2^64."""
    h = (h + part + 1) * GOLDEN & _ALL
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        h = (h ^ (h >> shift)) * multiplier & _ALL
    return h


def keyed_uniform(*parts: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from `keyed_hash`: its upper 53 bits over 2^53."""
    return (keyed_hash(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
