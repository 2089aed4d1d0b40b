"""The smallest limit under which torch's CUDA allocator runs an update again and again (no torch).

Without a limit the allocator keeps each segment that it ever took, and takes new ones where no kept
one fits: it reserves up to a fifth more than is in use. At a limit it gives unused segments back
and takes others, once or twice, until its segments fit the update. So an update runs under less
than it reserves without a limit (docs/results/published_batches.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from lbaccel.planning.cost.cuda_allocator import CachingAllocator, OutOfMemory

Request = tuple[int, int]  # an id and the bytes it takes; -1 frees it
STEP = 0.02  # of the bytes in use, between the limits that are tried
UPDATES = 5  # simulated under each limit
SETTLED = 2  # the last of them, in which the cache is not emptied


def smallest_limit(held: Sequence[Request], update: Sequence[Request]) -> int:
    """Bytes of segments with which updates follow each other without emptying the cache.

    Args:
        held: requests of what stays over all updates: weights, states of the optimizer.
        update: requests of one update. What it has not freed at its end is freed there.

    Returns:
        At least the most bytes in use at one time, at most what is reserved without a limit. It
        is found by bisection: under a limit `STEP` lower, updates do not settle. A lower one at
        which they happen to settle, with larger ones between at which they do not, is not taken.

    >>> MIB = 2**20
    >>> update = [(1, 30 * MIB), (1, -1), (2, 40 * MIB), (3, 20 * MIB)]
    >>> smallest_limit([], update) // MIB  # without a limit 70: the 30 MiB are kept
    60
    """
    free = _Updates(held, None)
    free.run(update)
    in_use = free.allocator.peak_allocated
    for _ in range(1, UPDATES):  # the first one leaves gaps, and the next may take segments more
        if free.run(update).is_steady:
            break
    reserved = free.allocator.peak_reserved
    steps = math.ceil((reserved - in_use) / (STEP * max(1, in_use)))
    tried = [int(in_use * (1 + STEP * i)) for i in range(steps)]
    limits = [limit for limit in tried if limit < reserved]
    first = bisect_left(limits, True, key=lambda limit: _settles(held, update, limit))
    return limits[first] if first < len(limits) else reserved


def _settles(held: Sequence[Request], update: Sequence[Request], limit: int) -> bool:
    retries: list[int] = []
    try:
        simulated = _Updates(held, limit)
        for number in range(1, UPDATES + 1):
            done = simulated.run(update)
            retries.append(done.num_retries)
            if done.is_steady:
                retries += [0] * (UPDATES - number)
                break
    except OutOfMemory:
        return False
    return not any(retries[-SETTLED:])


class _Done(NamedTuple):
    """An update that was run."""

    num_retries: int  # how often the cache was emptied
    is_steady: bool  # all is as before it, so each later one is the same


class _Updates:
    """An allocator that holds what stays, and runs updates."""

    def __init__(self, held: Sequence[Request], limit: int | None) -> None:
        self.allocator = CachingAllocator(capacity=limit)
        self._handles: dict[int, int] = {}
        self._play(held)
        self._stay = set(self._handles)

    def run(self, update: Sequence[Request]) -> _Done:
        """One update."""
        before, reserved = self.allocator.num_retries, self.allocator.reserved
        self._play(update)
        for name in set(self._handles) - self._stay:
            self.allocator.free(self._handles.pop(name))
        num_retries = self.allocator.num_retries - before
        return _Done(num_retries, not num_retries and self.allocator.reserved == reserved)

    def _play(self, requests: Sequence[Request]) -> None:
        for name, num_bytes in requests:
            if num_bytes != -1:
                self._handles[name] = self.allocator.malloc(num_bytes)
            elif name in self._handles:
                self.allocator.free(self._handles.pop(name))
