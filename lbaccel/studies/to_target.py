"""Updates to a target against batch size, and the batch size where their fall ends (no torch).

With S_min the updates that a run needs in the limit of large batches, a batch of B samples needs

    S(B) = S_min (1 + B_crit / B)

(McCandlish et al. 2018, arXiv 1812.06162, equation 2.11; Shallue et al. 2019 measure such curves).
Far below the critical batch B_crit twice the batch halves the updates (perfect scaling); far above
it the updates stay at S_min.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lbaccel.noise.arithmetic import Interval, rounded
from lbaccel.runs.groups import LEVEL

BEYOND = 1000.0  # critical batches are looked for so far below the smallest batch, and above
STEP = 0.25  # of the search, in log B_crit
LEAST = 1e-24  # a sum of squares of exact data, whose logarithm has to be finite


@dataclass(frozen=True)
class Attempt:
    """One run on its way to a target.

    Attributes:
        batch: its global batch size.
        updates: after which it first met the target; None: never, so the run is censored.
        until: its last update, where it is censored.
        after: the last evaluation before `updates`, or 0: the run met the target in between. None
            where `updates` is exact.
    """

    batch: int
    updates: int | None
    until: int = 0
    after: int | None = None


@dataclass(frozen=True)
class Bend:
    """The fitted curve of an arm.

    Attributes:
        min_updates: S_min; None where the data have no bend.
        critical_batch: B_crit; None where the data have no bend.
        interval: of B_crit, its ends 0 and infinity where the data give none; None below 3 runs.
        num_runs: that met the target.
        num_censored: that did not.
        num_left_out: censored runs that the fit of two runs can't take in.
        reason: why there is no bend, a clause.
    """

    min_updates: float | None = None
    critical_batch: float | None = None
    interval: Interval | None = None
    num_runs: int = 0
    num_censored: int = 0
    num_left_out: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, Any] | None:
        """The fit, None where there is no bend; an end of the interval that is infinite is None."""
        if self.critical_batch is None:
            return None
        low, high = (
            (None, None) if self.interval is None else (self.interval.low, self.interval.high)
        )
        return {
            "min_updates": self.min_updates,
            "critical_batch": self.critical_batch,
            "low": low,
            "high": None if high == math.inf else high,
            "level": LEVEL,
            "method": "profile likelihood",
        }

    def sentence(self, title: str) -> str:
        """The fit in words."""
        censored = ""
        if self.num_censored:
            total = self.num_runs + self.num_censored
            censored = f" {self.num_censored} of {total} runs never reached it (censored)."
        if self.num_left_out:
            censored += (
                " The curve leaves them out, since it goes through both runs that did and so "
                "measures no scatter: as slow as those are, it may be too flat. Run more seeds."
            )
        if self.critical_batch is None or self.min_updates is None:
            return f"{title}: no critical batch, since {self.reason}.{censored}"
        text = (
            f"{title}: the updates to the target follow {self.min_updates:,.0f} x (1 + "
            f"{rounded(self.critical_batch)} / batch), a critical batch of "
            f"{rounded(self.critical_batch)}"
        )
        if self.interval is None:
            return f"{text}; two runs give no interval.{censored}"
        shown = "excludes nothing" if self.interval.is_unknown else str(self.interval)
        how = f"{100 * LEVEL:g} % interval {shown}, {self.num_runs} runs, profile likelihood"
        return f"{text} ({how}).{censored}"


def fit_bend(attempts: Sequence[Attempt]) -> Bend:
    """S_min and B_crit of an arm by maximum likelihood, with a profile interval of B_crit.

    log S is taken to be normally distributed around log S_min + log(1 + B_crit / B), with one
    standard deviation at all batch sizes. A censored run contributes the probability that it had
    not met the target by its last update: without it, batch sizes at which slow seeds never get
    there would look fast. Beside only two runs that met it there is no standard deviation to judge
    it by, so it is left out there, and the sentence says so. With l(B_crit) the log-likelihood,
    maximised over the two other parameters, and n runs that met the target, the interval holds
    every B_crit with

        2 (max l - l(B_crit)) <= n log(1 + F / (n - 2))

    and F the 0.95 quantile of Fisher's distribution with 1 and n - 2 degrees of freedom. Without
    censored runs that is the F-test of least squares. It needs no resampling, so it holds for one
    seed too: the scatter of the batch sizes around the curve takes the place of the seeds'.

    A run is looked at by its evaluations alone, so when it met the target is known to the time
    between two of them, w in log updates; w^2 / 12 is added to the variance (that of a uniform
    error). Runs that meet it at their first evaluation have w = log 2.

    Args:
        attempts: of all seeds at all batch sizes, in any order.

    >>> curve = [Attempt(b, round(1000 * (1 + 512 / b))) for b in (64, 128, 256, 512, 1024)]
    >>> found = fit_bend(curve)
    >>> round(found.critical_batch), round(found.min_updates)
    (512, 1000)
    """
    met = [one for one in attempts if one.updates is not None and one.updates > 0]
    censored = [one for one in attempts if one.updates is None and one.until > 0]
    counts: dict[str, Any] = {
        "num_runs": len(met),
        "num_censored": sum(1 for one in attempts if one.updates is None),
    }
    sizes = sorted({one.batch for one in met})
    if len(sizes) < 2:
        where = f"only batch {sizes[0]:,} reached the target" if sizes else (
            "no run reached the target"
        )  # fmt: skip
        return Bend(reason=where, **counts)
    if len(met) == 2:
        counts["num_left_out"], censored = len(censored), []
    profile = _Profile(met, censored)
    start, end = math.log(sizes[0] / BEYOND), math.log(sizes[-1] * BEYOND)
    steps = [start + STEP * i for i in range(math.ceil((end - start) / STEP) + 1)]
    likelihoods = [profile(u) for u in steps]
    best = max(range(len(steps)), key=likelihoods.__getitem__)
    if best in (0, len(steps) - 1):
        interval = _interval(profile, steps, best, steps[best], likelihoods[best])
        return Bend(interval=interval, reason=_no_bend(best, interval), **counts)
    log_batch = _refined(profile, steps[best - 1], steps[best + 1])
    interval = _interval(
        profile, steps, best, log_batch, max(profile(log_batch), likelihoods[best])
    )
    return Bend(math.exp(profile.location(log_batch)), math.exp(log_batch), interval, **counts)


def _no_bend(best: int, interval: Interval | None) -> str:
    if best == 0:
        less = "" if interval is None or interval.high == math.inf else (
            f": it is below {rounded(interval.high)}"
        )  # fmt: skip
        return f"the updates do not fall with the batch size{less}"
    more = "" if interval is None or interval.low <= 0 else f": it is above {rounded(interval.low)}"
    return f"the updates fall as fast as the batch size grows, or faster{more}"


class _Profile:
    """The log-likelihood of log B_crit, maximised over S_min and the standard deviation."""

    def __init__(self, met: Sequence[Attempt], censored: Sequence[Attempt]) -> None:
        import numpy as np

        self.num_met = len(met)
        self.batches = np.array([one.batch for one in (*met, *censored)], dtype=float)
        times = [one.updates or one.until for one in (*met, *censored)]
        self.log_times = np.log(np.array(times, dtype=float))
        self.rounding = fmean(map(_rounding, met))

    def _residuals(self, log_batch: float) -> Any:
        import numpy as np

        return self.log_times - np.log1p(math.exp(log_batch) / self.batches)

    def __call__(self, log_batch: float) -> float:
        """The log-likelihood, up to a constant."""
        return self._maximised(self._residuals(log_batch))[0]

    def location(self, log_batch: float) -> float:
        """The log S_min that belongs to a log B_crit."""
        return self._maximised(self._residuals(log_batch))[1]

    def _maximised(self, values: Any) -> tuple[float, float]:
        """Of normal values, of which those behind the first `num_met` are lower bounds."""
        n, met, bounds = self.num_met, values[: self.num_met], values[self.num_met :]
        mean = float(met.mean())
        variance = max(float(((met - mean) ** 2).sum()), LEAST) / n + self.rounding
        if not len(bounds):
            return -n / 2 * math.log(variance) - n / 2, mean
        return _with_censored(
            met - mean, bounds - mean, math.sqrt(variance), shift=mean, least=self.rounding
        )


def _rounding(one: Attempt) -> float:
    """The variance of log updates that the distance of two evaluations leaves."""
    if one.after is None or not one.updates:
        return 0.0
    return math.log(one.updates / max(one.after, one.updates / 2)) ** 2 / 12


def _with_censored(
    met: Any, bounds: Any, spread: float, *, shift: float, least: float
) -> tuple[float, float]:
    """The maximum of a censored normal likelihood of at least the variance `least`, and its mean.

    In the parameters 1 / sigma and mu / sigma it is concave (Olsen 1978), so one search finds it.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_ndtr

    spread = max(spread, 1e-9)
    met, bounds = met / spread, bounds / spread
    n = len(met)

    def negative(at: Any) -> tuple[float, Any]:
        precision, centre = at  # 1 / sigma, mu / sigma
        off, room = precision * met - centre, centre - precision * bounds
        tail = log_ndtr(room)
        ratio = np.exp(-0.5 * room**2 - 0.5 * math.log(2 * math.pi) - tail)  # phi / Phi
        value = n * math.log(precision) - 0.5 * (off**2).sum() + tail.sum()
        slope = n / precision - (met * off).sum() - (bounds * ratio).sum()
        return -value, -np.array([slope, off.sum() + ratio.sum()])

    found: Any = minimize(
        negative,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-6, spread / math.sqrt(least) if least else None), (None, None)],
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    precision, centre = found.x
    return -float(found.fun) - n * math.log(spread), shift + spread * float(centre / precision)


def _refined(profile: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(
        lambda u: -profile(u), bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    return float(found.x)


def _interval(
    profile: _Profile, steps: Sequence[float], best: int, at: float, highest: float
) -> Interval | None:
    """Where the profile crosses its threshold on both sides; None where no run is left for it."""
    from scipy.optimize import brentq
    from scipy.special import fdtri

    n = profile.num_met
    if n < 3:
        return None
    threshold = highest - n / 2 * math.log1p(float(fdtri(1, n - 2, LEVEL)) / (n - 2))

    def above(u: float) -> float:
        return profile(u) - threshold

    ends = []
    for side, beyond in ((steps[:best][::-1], 0.0), (steps[best + 1 :], math.inf)):
        inner, end = at, beyond
        for outer in side:
            if above(outer) < 0:
                crossing: Any = brentq(above, *sorted((inner, outer)), xtol=1e-10)
                end = math.exp(crossing)
                break
            inner = outer
        ends.append(end)
    return Interval(*ends)


def points_of(attempts: Mapping[int, Mapping[int, Attempt]]) -> list[dict[str, Any]]:
    """Each batch size with the updates of its seeds; None is a censored run.

    The mean is None where a run is censored: `mean_met`, the mean of those that got there, is too
    small, and a lower bound of it.

    >>> (point,) = points_of({64: {0: Attempt(64, 100), 1: Attempt(64, None, until=400)}})
    >>> point["updates"], point["mean"], point["mean_met"], point["censored"]
    ([100, None], None, 100.0, 1)
    """
    points = []
    for batch, by_seed in sorted(attempts.items()):
        updates = [by_seed[seed].updates for seed in sorted(by_seed)]
        met = [u for u in updates if u is not None]
        censored = len(updates) - len(met)
        points.append(
            {
                "batch": batch,
                "updates": updates,
                "seeds": sorted(by_seed),
                "mean": None if censored or not met else fmean(met),
                "mean_met": fmean(met) if met else None,
                "censored": censored,
            }
        )
    return points
