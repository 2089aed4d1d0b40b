"""AdaScale: a learning rate that grows with the batch by as much as the noise lets it (no torch).

Johnson et al. 2020 (arXiv 2007.05105). With sigma^2 the variance of the gradient of a base batch,
mu^2 the squared norm of the mean gradient, and S = B / B0, an update of B samples has the gain

    r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2),    1 <= r <= S for S >= 1

at the learning rate r eta(t), and stands for r updates of B0: the schedule's time t is the sum of
the gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from lbaccel.errors import InputError, check_number


class Averages(Protocol):
    """The part of `RatioAverage` that is read here: averages of S = tr(Sigma) and of |G|^2."""

    @property
    def scale_s(self) -> float:
        """S; nan before the first estimate."""
        ...

    @property
    def grad_norm_sq(self) -> float:
        """|G|^2; nan before the first estimate, and noise may put it below zero."""
        ...


def adascale_gain(sigma2: float, mu2: float, scale: float) -> float:
    """The gain r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2) of an update.

    S where only noise is left, 1 where there is none. Estimates below zero count as zero, and where
    both do, nothing is known and the gain is 1 (S, where S is below 1).

    Args:
        sigma2: variance of the gradient of a base batch, summed over parameters.
        mu2: squared norm of the mean gradient.
        scale: S, batches of the base size in the update; below 1 the gain lies in [S, 1].

    Raises:
        InputError: a scale that is not above 0, or sigma2 or mu2 that is not finite.

    Source: Johnson et al. 2020, algorithm 1 and proposition 1.

    >>> adascale_gain(1.0, 0.0, 8), adascale_gain(0.0, 1.0, 8), adascale_gain(3.0, 1.0, 3)
    (8.0, 1.0, 2.0)
    """
    check_number("scale", scale)
    if not (math.isfinite(sigma2) and math.isfinite(mu2)):
        raise InputError(f"sigma2={sigma2}, mu2={mu2}: the gain needs finite numbers.")
    sigma2, mu2 = max(sigma2, 0.0), max(mu2, 0.0)
    if sigma2 + mu2 == 0.0:
        return min(1.0, scale)
    largest = max(sigma2, mu2)  # in its unit, so that nothing overflows or vanishes
    sigma2, mu2 = sigma2 / largest, mu2 / largest
    return (sigma2 + mu2) / (sigma2 / scale + mu2)


def moments(unit_sq: Sequence[float], mean_sq: float) -> tuple[float, float]:
    """sigma^2 and mu^2 from the gradients of S units of a base batch each.

        sigma^2 = (sum |g_i|^2 - S |g|^2) / (S - 1)        mu^2 = |g|^2 - sigma^2 / S

    Both unbiased; g is the mean of the g_i, not their sum (the two are easily confused:
    facebookresearch/fairscale#1062).

    Args:
        unit_sq: |g_i|^2 of each unit.
        mean_sq: |g|^2.

    Raises:
        InputError: fewer than two units.

    Source: Johnson et al. 2020, appendix B.3.

    >>> moments([5.0, 13.0], 4.0)  # g = (1, 2), (3, -2); their mean (2, 0)
    (10.0, -1.0)
    """
    num_units = len(unit_sq)
    if num_units < 2:
        raise InputError(f"{num_units} unit: the variance needs at least two. Use smaller ones.")
    sigma2 = (sum(unit_sq) - num_units * mean_sq) / (num_units - 1)
    return sigma2, mean_sq - sigma2 / num_units


class AdaScale:
    """The gain of the next update, and how many updates of the base batch the run stands for.

    Before each update `gain(averages, B)` is what its learning rate eta(progress) is multiplied by
    (from the updates before it, so that it does not depend on what it scales), and after it, where
    it was applied, `advance(gain)` moves the schedule's time. Before the first estimate the gain is
    1 (S, where S is below 1).

    Args:
        base_batch_size: B0, which the learning rate was tuned at.

    Raises:
        InputError: a batch that is not above 0.

    >>> from lbaccel.noise.arithmetic import NoiseEstimate, RatioAverage
    >>> average, rule = RatioAverage(half_life=10_000), AdaScale(base_batch_size=100)
    >>> average.add(NoiseEstimate(scale_s=300.0, grad_norm_sq=1.0), num_samples=300)
    >>> gain = rule.gain(average, global_batch_size=300)  # sigma^2 = 3, mu^2 = 1, S = 3
    >>> rule.advance(gain)
    >>> gain, rule.progress
    (2.0, 2.0)
    """

    def __init__(self, base_batch_size: float) -> None:
        check_number("base_batch_size", base_batch_size)
        self.base_batch_size = base_batch_size
        self.progress = 0.0

    def gain(self, averages: Averages, global_batch_size: float) -> float:
        """r of an update of `global_batch_size`: sigma^2 = S / B0, mu^2 = |G|^2."""
        scale = global_batch_size / self.base_batch_size
        check_number("global_batch_size", global_batch_size)
        sigma2, mu2 = averages.scale_s / self.base_batch_size, averages.grad_norm_sq
        if math.isnan(sigma2) or math.isnan(mu2):
            return min(1.0, scale)
        return adascale_gain(sigma2, mu2, scale)

    def advance(self, gain: float) -> None:
        """Count an applied update: it stood for `gain` updates of the base batch.

        An update that wrote no weight (loss dropout, an fp16 overflow) must not be counted.
        """
        check_number("gain", gain)
        self.progress += gain

    def state_dict(self) -> dict[str, float]:
        """The progress."""
        return {"progress": self.progress}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self.progress = float(state["progress"])
