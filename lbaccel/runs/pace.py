"""How far a run is, how long the rest takes, and when to say so (no torch)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from lbaccel.runs.length import Length

SHORTEST, LONGEST = 5.0, 600.0  # seconds between two lines
GROWTH = 0.1  # of the time since the start: a line each tenth of it


def clock_time(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any.

    >>> clock_time(9.4), clock_time(845), clock_time(90_061)
    ('0:09', '14:05', '25:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunPlace(NamedTuple):
    """Where a run stands.

    >>> str(RunPlace(23, 845.0)), str(RunPlace(0, None))
    ('23 %, 14:05 left', '0 %')
    """

    percent: int  # of its samples
    seconds_left: float | None  # None: not known yet, or none are left

    def __str__(self) -> str:
        if self.seconds_left is None:
            return f"{self.percent} %"
        return f"{self.percent} %, {clock_time(self.seconds_left)} left"


class Pace:
    """Measures this process's seconds a sample, from its first update on.

    The rest of a run of N samples, of which n are done, takes

        (t - t_1) / (n - n_1) (N - n)

    with t_1 and n_1 at the end of the first update of this process, whose own time holds what comes
    once (workers that start, kernels that are chosen); time lost before a resume counts nothing.
    Evaluations and checkpoints since then count in proportion. Samples are counted, since updates
    take longer where the batch grows.

    Args:
        length: of the run; it may change.
        clock: seconds.
    """

    def __init__(self, length: Length, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._length, self._clock = length, clock
        self._started = clock()
        self._first: tuple[float, int] | None = None
        self._said = -math.inf

    def after_update(self, update: int) -> RunPlace:
        """Take an update in; the time left is known from the second of this process on."""
        now, done = self._clock(), self._length.samples_before(update)
        left = self._length.samples_before(self._length.stop_at) - done
        percent = 100 * done // max(1, done + left)
        if self._first is None:
            self._first = now, done
        seconds, samples = now - self._first[0], done - self._first[1]
        if samples <= 0 or left <= 0:
            return RunPlace(percent, None)
        return RunPlace(percent, seconds / samples * left)

    def is_due(self, update: int) -> bool:
        """Whether it is time for a line: the first and the last update, and seldom in between.

        A line follows another after 5 seconds at least, then after a tenth of the time since the
        start, at most after 10 minutes: about 60 lines for the first two hours, 6 an hour then.
        """
        now = self._clock()
        wait = min(max(SHORTEST, GROWTH * (now - self._started)), LONGEST)
        if update < self._length.stop_at and now - self._said < wait:
            return False
        self._said = now
        return True
