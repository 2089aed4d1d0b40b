"""Advice on the batch of a run from its noise scale, in figures (no torch).

With Emin and Smin the samples and updates that a run needs in the limits of small and of large
batches, and B_crit = Emin / Smin, a batch of B needs (McCandlish et al. 2018, arXiv 1812.06162,
equations 2.11 and 2.12, solved for E = B S)

    samples E = Emin (1 + B / B_crit)        updates S = Smin (1 + B_crit / B)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbaccel.noise.arithmetic import Interval, rounded

AT_THE_CRITICAL_BATCH = 1.1  # a factor that the estimate can't tell from 1


@dataclass(frozen=True)
class NoiseReading:
    """One line of a run's noise scale."""

    critical: float  # S / |G|^2; infinite or nan where the averages give no number
    interval: Interval
    num_updates: float  # effective number of updates in the averages
    samples_seen: int | None = None


def samples_factor(global_batch_size: float, critical: float) -> float:
    """Samples that a batch needs over the fewest: 1 + B / B_crit.

    >>> samples_factor(3100, 3100)
    2.0
    """
    return 1.0 + global_batch_size / critical


def updates_factor(global_batch_size: float, critical: float) -> float:
    """Updates that a batch needs over the fewest: 1 + B_crit / B.

    >>> updates_factor(3100, 3100)
    2.0
    """
    return 1.0 + critical / global_batch_size


def trade(small: float, large: float, critical: float) -> tuple[float, float]:
    """The cost of a larger batch: the factor on the samples, and the factor fewer updates.

    >>> samples, updates = trade(3100, 16384, critical=3100)
    >>> f"{samples:.1f} times the samples for {updates:.1f} times fewer updates"
    '3.1 times the samples for 1.7 times fewer updates'
    """
    return (
        samples_factor(large, critical) / samples_factor(small, critical),
        updates_factor(small, critical) / updates_factor(large, critical),
    )


def advice(reading: NoiseReading, global_batch_size: int) -> list[str]:
    """Two lines: what they concern, and what the run's batch costs beside the critical one.

    >>> for line in advice(NoiseReading(3123.0, Interval(2613.0, 3790.0), 40.4), 16384):
    ...     print(line)
    This concerns training loss at tuned learning rates, near the end of the run (an average over
    some 40 updates; earlier the critical batch is smaller as a rule).
    critical batch about 3,100 (2,600 to 3,800): from 3,100 to 16,384 costs 3.1 times the samples
    for 1.7 times fewer updates
    """
    topic = (
        "This concerns training loss at tuned learning rates, near the end of the run (an average "
        f"over some {reading.num_updates:.0f} updates; earlier the critical batch is smaller as a "
        "rule)."
    )
    return [topic, _verdict(reading, global_batch_size)]


def _verdict(reading: NoiseReading, batch: int) -> str:
    critical, interval = reading.critical, reading.interval
    if math.isfinite(critical) and critical > 0:
        if interval.is_unknown:
            head = f"critical batch about {rounded(critical)}, but its interval excludes nothing"
            return f"{head}: too few updates to go by. A longer run says more"
        head = f"critical batch about {rounded(critical)} ({interval}): "
        small, large = sorted((critical, float(batch)))
        if large < AT_THE_CRITICAL_BATCH * small:
            return (
                f"{head}{batch:,} is there, with twice the fewest samples and twice the fewest "
                "updates"
            )
        samples, updates = trade(small, large, critical)
        names = (rounded(critical), f"{batch:,}")
        start, end = names if critical < batch else names[::-1]
        return (
            f"{head}from {start} to {end} costs {samples:.1f} times the samples for {updates:.1f} "
            "times fewer updates"
        )
    if interval.low > 0:
        head = f"critical batch above {rounded(interval.low)}, with no upper bound from this run: "
        if interval.low > batch:
            most, _ = trade(batch, 2 * batch, interval.low)
            return f"{head}twice the batch of {batch:,} costs at most {most:.2f} times the samples"
        return f"{head}whether {batch:,} is below it is not known"
    return (
        "critical batch unknown: the mean gradient does not stand out from its noise. A longer run "
        "says more"
    )


def closing_advice(noise_scale: Any, global_batch_size: int) -> str:
    """The last lines of the recipe: the two of `advice`, or the reason why the run has none.

    Args:
        noise_scale: a `NoiseScale`.
        global_batch_size: the run's.
    """
    metrics = noise_scale.metrics()
    if not metrics:
        return f"critical batch unknown: {noise_scale.reason}"
    return "\n".join(advice(reading_of(metrics), global_batch_size))


def reading_of(metrics: Mapping[str, Any], *, samples_seen: int | None = None) -> NoiseReading:
    """A reading out of a line of metrics; what is null or missing there is infinite.

    >>> reading_of({"noise/critical_batch_size": 8.0, "noise/low": 4.0, "noise/high": None})
    NoiseReading(critical=8.0, interval=Interval(low=4.0, high=inf), num_updates=0.0, ...)
    """

    def number(name: str, missing: float) -> float:
        value = metrics.get(f"noise/{name}")
        return missing if value is None else float(value)

    critical = number("critical_batch_size", math.nan)
    return NoiseReading(
        critical if critical > 0 else math.nan,
        Interval(number("low", 0.0), number("high", math.inf)),
        number("num_updates", 0.0),
        samples_seen,
    )
