"""An arm over its batch sizes: how far it scales, and its interquartile mean (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbaccel.runs.groups import LEVEL, Mean
from lbaccel.studies.judging import ROUNDING, Outcomes, amount, diverged_text, paired

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class ScalingLimit:
    """The largest batch size up to which an arm loses no more than some points.

    Attributes:
        points: of the mean loss that is allowed.
        batch: None where the arm has no result at its first batch size.
        factor: batch over the first batch size.
        resolved: the intervals exclude a larger loss at each batch size up to `batch`.
        sentence: all of it in words.
    """

    points: float
    batch: int | None
    factor: float | None
    resolved: bool
    sentence: str


def scaling_limit(
    places: Mapping[int, Outcomes], *, base: int, points: float, title: str, metric: str
) -> ScalingLimit:
    """The scaling limit of an arm, by its own results at the batch size `base`.

    It is the largest batch B such that at B and at every batch size from `base` to B the mean
    paired difference is at least -`points`, and no run diverged.

    Args:
        places: batch size to results of the arm.
        base: the batch size that the others are compared with.
        points: of the loss that is allowed.
        title: of the arm.
        metric: one in %.
    """
    first = places.get(base)
    if first is None or not first.values or first.diverged:
        why = "has no result" if first is None or not first.diverged else "diverged"
        said = f"{title}: no scaling limit, since batch {base:,} {why}."
        return ScalingLimit(points, None, None, False, said)
    limit, stopped, unresolved = base, "", ""
    for batch in sorted(b for b in places if b > base):
        mean = Mean(tuple(paired(places[batch], first).values()))
        if places[batch].diverged:
            stopped = f"At batch {batch:,} {diverged_text(places[batch], 'this arm')}"
        elif mean.mean is None:
            stopped = f"Batch {batch:,} has no result yet."
        elif mean.mean < -points - ROUNDING:
            stopped = f"At batch {batch:,} it is {amount(mean.mean, metric)}."
        if stopped:
            break
        low = mean.interval[0] if mean.interval else -math.inf
        if low < -points - ROUNDING and not unresolved:
            unresolved = _not_excluded(batch, low, n=mean.n, points=points)
        limit = batch
    if limit == base and "has no result yet" in stopped:
        said = f"{title}: no scaling limit is known yet."
    elif limit == base:
        said = f"{title}: no batch size above {base:,} stays within {points:.1f} points of it."
    else:
        said = (
            f"{title}: within {points:.1f} points of batch {base:,} up to batch {limit:,}, "
            f"a factor of {limit / base:g}. {unresolved or 'The intervals resolve it.'}"
        )
    last = stopped or "No larger batch was run."
    return ScalingLimit(points, limit, limit / base, not unresolved, f"{said} {last}")


def _not_excluded(batch: int, low: float, *, n: int, points: float) -> str:
    if low == -math.inf:
        return "One seed gives no interval, so this is not resolved."
    return (
        f"The means say so, but this is not resolved: at batch {batch:,} the interval of {n} seeds "
        f"reaches {low:+.2f} points."
    )


@dataclass(frozen=True)
class Aggregate:
    """The interquartile mean of an arm over all its batch sizes and seeds, with its interval."""

    value: float
    low: float | None
    high: float | None
    num_runs: int


def interquartile_mean(places: Sequence[Sequence[float]], *, seed: int = 0) -> Aggregate | None:
    """The interquartile mean over batch sizes x seeds, with a stratified bootstrap interval.

    It is the mean of the values without the lowest and the highest quarter of them. The bootstrap
    draws the seeds of each batch size anew (percentiles of 2,000 resamples). With few seeds such an
    interval is too narrow: it says less than the paired intervals of the single batch sizes.

    Args:
        places: the results at each batch size.
        seed: of the resampling.

    Returns:
        None of no values; without an interval where a batch size has a single one.

    Source: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical
    precipice", section 4.

    >>> interquartile_mean([[1.0, 2.0], [3.0, 100.0]]).value
    2.5
    """
    import numpy as np
    from scipy.stats import bootstrap, trim_mean

    samples = [np.asarray(values, dtype=float) for values in places if len(values)]
    if not samples:
        return None

    def statistic(*drawn: Any, axis: int = -1) -> Any:
        return trim_mean(np.concatenate(drawn, axis=axis), 0.25, axis=axis)

    value, num_runs = float(statistic(*samples)), sum(map(len, samples))
    if min(map(len, samples)) < 2:
        return Aggregate(value, None, None, num_runs)
    resample: Any = bootstrap  # scipy renamed `random_state` to `rng` in 1.15, and takes both
    found = resample(
        samples,
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Aggregate(value, float(found.low), float(found.high), num_runs)
