"""Axes of a chart: places and ticks; `script.js` has the same once more (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "log", "log2"]
_PAD = 0.04  # of the range, at each end
_MOST_TICKS = 7


@dataclass(frozen=True)
class Scale:
    """An axis: `place` is 0 at `low` and 1 at `high`.

    >>> Scale("log", 1.0, 100.0).place(10.0)
    0.5
    """

    kind: Kind
    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value stands; NaN for a value of at most 0 on a log axis."""
        if self.kind == "linear":
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return math.nan
        low, high = math.log10(self.low), math.log10(self.high)
        return (math.log10(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and labels."""
        if self.kind == "linear":
            return [(v, short(v)) for v in linear_ticks(self.low, self.high)]
        if self.kind == "log2":
            return [(v, f"{v:,.0f}" if v >= 1 else short(v)) for v in _powers_of_2(self)]
        return [(v, short(v)) for v in log_ticks(self.low, self.high)]


def scale_of(values: Iterable[float], kind: Kind, *, most: float | None = None) -> Scale:
    """The axis of these values, a little wider than their range; `most` bounds a linear one.

    >>> scale_of([], "linear")
    Scale(kind='linear', low=0.0, high=1.0)
    """
    found = [v for v in values if math.isfinite(v) and (kind == "linear" or v > 0)]
    if not found:
        return Scale(kind, 0.0, 1.0) if kind == "linear" else Scale(kind, 1.0, 10.0)
    low, high = min(found), max(found)
    if kind == "linear":
        pad = _PAD * (high - low) or abs(low) / 10 or 1.0
        top = high + pad
        if most is not None and high <= most:
            top = min(top, most + 0.1 * pad)
        return Scale(kind, low - pad, top)
    factor = (high / low) ** _PAD if high > low else 2.0
    return Scale(kind, low / factor, high * factor)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> linear_ticks(0.3, 9.0)
    [2.0, 4.0, 6.0, 8.0]
    """
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(i * step, low), high) for i in range(first, last + 1)]  # 3 x 0.2 > 0.6


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where they are few.

    >>> log_ticks(0.8, 30.0)
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / _MOST_TICKS))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [m * 10.0**k for k in range(first, last + 1, stride) for m in factors]
    found = [v for v in found if low <= v <= high]
    return found if len(found) >= 3 else linear_ticks(low, high, 4)


def _powers_of_2(scale: Scale) -> list[float]:
    first, last = math.ceil(math.log2(scale.low)), math.floor(math.log2(scale.high))
    stride = max(1, math.ceil((last - first + 1) / _MOST_TICKS))
    return [2.0**k for k in range(first, last + 1, stride)]


def short(value: float) -> str:
    """A number of a tick, with at most five digits.

    >>> short(0.05), short(1500), short(120000), short(2.5e6), short(0.00002)
    ('0.05', '1500', '120k', '2.5M', '2e-5')
    """
    size = abs(value)
    if size >= 1e6:
        return f"{_trimmed(value / 1e6)}M"
    if size >= 1e4:
        return f"{_trimmed(value / 1e3)}k"
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return _trimmed(value)


def _trimmed(value: float) -> str:
    return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"
