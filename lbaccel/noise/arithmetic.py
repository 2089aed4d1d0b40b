"""Arithmetic of the gradient noise scale: estimates, averages, Fieller's interval (no torch).

Per sample the gradient has mean G and covariance Sigma. With S = tr(Sigma), the critical batch is
B_crit = S / |G|^2 (McCandlish et al. 2018, arXiv 1812.06162, equation 2.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lbaccel.errors import check_number


class NoiseEstimate(NamedTuple):
    """The estimates that one update gives of S and |G|^2: unbiased, and noisy."""

    scale_s: Any  # S, of one sample
    grad_norm_sq: Any  # |G|^2, may be below zero


def estimate(
    sum_unit_sq: Any,
    update_sq: Any,
    *,
    num_samples: Any,
    num_units: Any,
    training_set_size: float = math.inf,
    repeat: Any = 1.0,
) -> NoiseEstimate:
    """S and |G|^2 from the norms of K units of n_i samples and of their mean (floats or arrays).

    With mean gradients g_i of the units, B = sum n_i and g = sum n_i g_i / B,

        S    = (sum n_i |g_i|^2 - B |g|^2) / (K - 1)
        |G|^2 = |g|^2 - S / B

    Both are exact in expectation, for any distribution and any sizes, where samples are drawn
    independently: Cov(g_i) = Sigma / n_i gives E |g_i|^2 = |G|^2 + S / n_i, so that
    E sum n_i |g_i|^2 = B |G|^2 + K S, and Cov(g) = Sigma / B gives E |g|^2 = |G|^2 + S / B, hence
    E[sum n_i |g_i|^2 - B |g|^2] = (K - 1) S. For two sizes that is appendix A.1 of the source.

    Without replacement two samples of one epoch have covariance -Sigma / N. Let r be the share of
    pairs (a sample with itself included) that lie in one epoch: 1, or sum b_e^2 / B^2 where b_e
    samples of the update are of epoch e. Then E |g|^2 = |G|^2 + S / B - r S / N, a unit (within
    one epoch) has E |g_i|^2 = |G|^2 + S / n_i - S / N, and

        S    = (sum n_i |g_i|^2 - B |g|^2) / (K - 1 - (1 - r) B / N)
        |G|^2 = |g|^2 - S / B + r S / N

    Args:
        sum_unit_sq: sum of n_i |g_i|^2 over the units of all ranks.
        update_sq: |g|^2, before clipping and without a loss scale.
        num_samples: B.
        num_units: K, above 1.
        training_set_size: N; infinite where samples are drawn independently.
        repeat: r, see `same_epoch`.

    Source: McCandlish et al. 2018, appendix A.1; the terms in N are derived above.

    >>> estimate(100.0, 6.0, num_samples=10, num_units=5)  # 5 units of 2 samples with |g_i|^2 = 10
    NoiseEstimate(scale_s=10.0, grad_norm_sq=5.0)
    """
    share = num_samples / training_set_size
    spread = sum_unit_sq - num_samples * update_sq
    scale_s = spread / (num_units - 1 - (1 - repeat) * share)
    return NoiseEstimate(scale_s, update_sq - scale_s / num_samples * (1 - repeat * share))


def same_epoch(start: int, num_samples: int, *, samples_per_epoch: int) -> float:
    """Share of an update's pairs of samples that lie in one epoch: sum b_e^2 / B^2.

    Args:
        start: position of its first sample in the stream of epochs.
        num_samples: B.
        samples_per_epoch: where one epoch ends and the next begins.

    >>> same_epoch(0, 8, samples_per_epoch=10), same_epoch(8, 4, samples_per_epoch=10)
    (1.0, 0.5)
    """
    total, position, end = 0, start, start + num_samples
    while position < end:
        edge = min(end, (position // samples_per_epoch + 1) * samples_per_epoch)
        total += (edge - position) ** 2
        position = edge
    return total / num_samples**2


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a ratio of at least 0: `high` may be infinite, `low` 0.

    >>> str(Interval(2613.0, 3790.0)), str(Interval(2613.0, math.inf)), str(Interval(0.0, math.inf))
    ('2,600 to 3,800', '2,600 to unbounded', 'unknown')
    """

    low: float
    high: float

    @property
    def is_unknown(self) -> bool:
        """Whether it excludes nothing."""
        return self.low <= 0.0 and self.high == math.inf

    def __str__(self) -> str:
        if self.is_unknown:
            return "unknown"
        high = "unbounded" if self.high == math.inf else rounded(self.high)
        return f"{rounded(self.low)} to {high}"


UNKNOWN = Interval(0.0, math.inf)


def rounded(value: float) -> str:
    """Two significant digits: what an estimate of this kind can bear.

    >>> rounded(3123.4), rounded(16.4), rounded(0.123), rounded(0)
    ('3,100', '16', '0.12', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = round(value, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}"


def fieller(x: float, y: float, *, var_x: float, var_y: float, cov: float, t: float) -> Interval:
    """Interval of E x / E y (of at least 0) for two correlated means: Fieller's theorem.

    All ratios rho that (x - rho y)^2 <= t^2 (var_x - 2 rho cov + rho^2 var_y) does not exclude,
    cut to rho >= 0. It is unbounded where y is not above 0 by t standard errors; a set of two
    pieces, or none, excludes nothing that can be relied on and is `UNKNOWN`.

    Args:
        x: mean of the numerator.
        y: mean of the denominator.
        var_x: variance of the mean x.
        var_y: variance of the mean y.
        cov: covariance of the two means.
        t: quantile of Student's t.

    Source: Fieller 1954, J. R. Stat. Soc. B 16, 175-185.

    >>> fieller(6.0, 2.0, var_x=0.0, var_y=0.0, cov=0.0, t=2.0)
    Interval(low=3.0, high=3.0)
    """
    a = y * y - t * t * var_y
    b = x * y - t * t * cov
    c = x * x - t * t * var_x
    root = b * b - a * c
    if a > 0 and y > 0:
        # root >= 0 here: x / y itself is never excluded.
        width = math.sqrt(max(root, 0.0))
        if b + width < 0:
            return UNKNOWN
        return Interval(max(0.0, (b - width) / a), (b + width) / a)
    if a < 0 < c and x > 0:  # two roots of opposite sign, and what lies between is excluded
        return Interval((b - math.sqrt(root)) / a, math.inf)
    return UNKNOWN


class RatioAverage:
    """Averages of S and |G|^2 apart, with their covariance, and their ratio with its interval.

    An exponential average whose weights halve every `half_life` samples: an update of B samples
    that lies s samples back has weight B 2^(-s / half_life). Means are divided by the sum of the
    weights, so the start needs no correction. Samples and not updates, so that runs of different
    batch sizes, and a run whose batch grows, average over the same stretch of training.

    The variance of a mean is the weighted variance over n - 1, n = (sum w)^2 / sum w^2 being the
    effective number of updates, and Student's t has n - 1 degrees of freedom. A drift of
    S and |G|^2 within the average widens the interval.

    Args:
        half_life: samples.

    Raises:
        InputError: a half-life that is not above 0.

    >>> average = RatioAverage(half_life=1000)
    >>> for s, g in ((90.0, 1.0), (110.0, 1.0), (100.0, 1.0)):
    ...     average.add(NoiseEstimate(s, g), num_samples=10)
    >>> round(average.ratio)
    100
    """

    def __init__(self, half_life: float) -> None:
        check_number("half_life", half_life)
        self.half_life = float(half_life)
        self._weight = self._weight_sq = 0.0
        self._x = self._y = 0.0
        self._xx = self._xy = self._yy = 0.0  # weighted sums of products about the means

    def add(self, found: NoiseEstimate, *, num_samples: int) -> None:
        """Take an update in (West 1979: means and products, updated stably)."""
        keep = 2.0 ** (-num_samples / self.half_life)
        w = float(num_samples)
        self._weight = self._weight * keep + w
        self._weight_sq = self._weight_sq * keep * keep + w * w
        dx, dy = found.scale_s - self._x, found.grad_norm_sq - self._y
        part = w / self._weight
        self._x += part * dx
        self._y += part * dy
        rest = w * (1.0 - part)
        self._xx = self._xx * keep + rest * dx * dx
        self._xy = self._xy * keep + rest * dx * dy
        self._yy = self._yy * keep + rest * dy * dy

    @property
    def num_updates(self) -> float:
        """Effective number of updates in the averages."""
        return self._weight**2 / self._weight_sq if self._weight_sq else 0.0

    @property
    def scale_s(self) -> float:
        """The average of S."""
        return self._x if self._weight else math.nan

    @property
    def grad_norm_sq(self) -> float:
        """The average of |G|^2; noise may put it below zero."""
        return self._y if self._weight else math.nan

    @property
    def ratio(self) -> float:
        """S / |G|^2: infinite where |G|^2 is not above 0, nan where S is not or is not known."""
        if not self._weight or self._x <= 0:
            return math.nan
        return self._x / self._y if self._y > 0 else math.inf

    def interval(self, level: float = 0.95) -> Interval:
        """Fieller's interval of the ratio; `UNKNOWN` below two effective updates."""
        if self.num_updates < 2.0:
            return UNKNOWN
        from scipy.special import stdtrit

        free = self.num_updates - 1.0
        t = float(stdtrit(free, 0.5 + level / 2))
        var_x, cov, var_y = (v / self._weight / free for v in (self._xx, self._xy, self._yy))
        return fieller(self._x, self._y, var_x=var_x, var_y=var_y, cov=cov, t=t)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        for name in _STATE:
            setattr(self, f"_{name}", float(state[name]))


_STATE = ("weight", "weight_sq", "x", "y", "xx", "xy", "yy")
