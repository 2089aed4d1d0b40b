"""Long curves as fewer points: the extremes of each stretch stay (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 40  # points of a curve, however many curves there are


def kept(values: Sequence[float | None], most: int) -> list[int]:
    """The places to keep, at most `most` (but 5): of each stretch its lowest and its highest value.

    The first and the last place are kept, and a None (a value that is not finite) in each stretch
    that has one.

    >>> kept([5, 1, 9, 2, 3, 8, 0, 4], 6)
    [0, 1, 2, 5, 6, 7]
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // (3 if None in values else 2))
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


def kept_together(
    curves: Sequence[Sequence[tuple[int, float | None]]], most: int
) -> list[list[int]]:
    """Of each curve the places to keep, at most about `most`, so that the curves have them alike.

    A mean over curves needs values at the same updates. So each curve has a share of the points
    for its own extremes, and keeps what the others keep too.

    Args:
        curves: update and value of each point.
        most: points of a curve.

    >>> kept_together([[(u, -abs(u - 7)) for u in range(99)], [(u, u) for u in range(99)]], 10)
    [[0, 7, 98], [0, 7, 98]]
    """
    if all(len(curve) <= most for curve in curves):
        return [list(range(len(curve))) for curve in curves]
    share = most // max(1, len(curves))
    updates = {curve[i][0] for curve in curves for i in kept([value for _, value in curve], share)}
    return [[i for i, (update, _) in enumerate(curve) if update in updates] for curve in curves]


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
