"""Long curves as fewer points: the extremes of each stretch stay (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 40  # points of a curve, however many curves there are


def kept(values: Sequence[float | None], most: int) -> list[int]:
    """The places to keep, at most about `most`: of each stretch its lowest and its highest value.

    The first and the last place are kept, and a None (a value that is not finite) in each stretch
    that has one.

    >>> kept([5, 1, 9, 2, 3, 8, 0, 4], 4)
    [0, 1, 2, 5, 6, 7]
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, most // 2)
    found = {0, count - 1}
    for i in range(stretches):
        places = range(count * i // stretches, count * (i + 1) // stretches)
        known = [(value, at) for at in places if (value := values[at]) is not None]
        if known:
            found |= {min(known)[1], max(known)[1]}
        found |= (
            {next((at for at in places if values[at] is None), places[0])}
            if (len(known) < len(places))
            else set()
        )
    return sorted(found)


def fair_share(lengths: Sequence[int], budget: int) -> int:
    """The most points that a curve may have, so that all of them have about `budget`.

    >>> fair_share([10, 10, 5000], 500)
    480
    """
    left, rest = budget, sorted(lengths)
    while rest:
        share = left // len(rest)
        if rest[0] > share:
            return max(LEAST, share)
        left -= rest.pop(0)
    return max(LEAST, max(lengths, default=0))


def all_rounded(values: Sequence[float | None]) -> list[float | int | None]:
    """Each number as `rounded` gives it."""
    return [rounded(value) for value in values]


def rounded(value: float | None, digits: int = 5) -> float | int | None:
    """A number with so many digits, for a curve; None where it is not finite.

    >>> rounded(0.123456789), rounded(2.0), rounded(float("nan"))
    (0.12346, 2, None)
    """
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
