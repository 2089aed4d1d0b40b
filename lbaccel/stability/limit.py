"""How high a learning rate the loss's curvature allows: SGD's limits, and what to say (no torch).

Along an eigenvector of the Hessian with eigenvalue L > 0 the loss is L w^2 / 2, and SGD at a rate
eta with momentum m is a linear recursion of second order in w. By Jury's criterion the roots of
z^2 + b z + c lie inside the unit circle where |c| < 1 and 1 + c > |b|. With a = eta L:

heavy ball (v = m v + L w, w = w - eta v):

    w_(t+1) = (1 + m - a) w_t - m w_(t-1)                  stable where a < 2 (1 + m)

Nesterov as torch has it (v = m v + L w, w = w - eta (L w + m v)):

    w_(t+1) = (1 + m) (1 - a) w_t - m (1 - a) w_(t-1)      stable where a < (2 + 2 m) / (1 + 2 m)

so at m = 0.9 Nesterov's limit is 1.357, and heavy ball's 3.8. Every direction is stable where that
of the largest eigenvalue is. Cohen et al. 2021, arXiv 2103.00065: section 2 and appendix B.
"""

from __future__ import annotations

import math

from lbaccel.errors import InputError, check_number


def stability_limit(*, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The largest stable eta x lambda_max of SGD on a quadratic: see the module's equations.

    >>> stability_limit(), stability_limit(momentum=0.9)
    (2.0, 3.8)
    >>> round(stability_limit(momentum=0.9, nesterov=True), 3)
    1.357

    Raises:
        InputError: a momentum that is not in 0..1, below 1.
    """
    check_number("momentum", momentum, zero=True)
    if momentum >= 1:
        raise InputError(f"momentum={momentum} must be in 0..1, below 1.")
    heavy_ball = 2 * (1 + momentum)
    return heavy_ball / (1 + 2 * momentum) if nesterov else heavy_ball


def stable_rate(lambda_max: float, *, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The learning rate at which eta x `lambda_max` is at the limit; inf without curvature.

    >>> stable_rate(2.0), stable_rate(-1.0)
    (1.0, inf)
    """
    limit = stability_limit(momentum=momentum, nesterov=nesterov)
    return limit / lambda_max if lambda_max > 0 else math.inf


def limits(lambda_max: float, *, momentum: float, nesterov: bool) -> dict[str, float | None]:
    """The limit and the stable rate for JSON, which has no number for infinity.

    >>> limits(2.0, momentum=0.0, nesterov=False), limits(0.0, momentum=0.0, nesterov=False)
    ({'limit': 2.0, 'stable_rate': 1.0}, {'limit': 2.0, 'stable_rate': None})
    """
    rate = stable_rate(lambda_max, momentum=momentum, nesterov=nesterov)
    return {
        "limit": stability_limit(momentum=momentum, nesterov=nesterov),
        "stable_rate": rate if math.isfinite(rate) else None,
    }


def rate_sentence(
    lr: float,
    lambda_max: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    num_samples: int | None = None,
) -> str:
    """How `lr` stands to the stable rate, in one line of figures.

    Args:
        lr: the learning rate of an update.
        lambda_max: largest eigenvalue of the loss's Hessian (`largest_curvature`).
        momentum: of SGD.
        nesterov: whether it is Nesterov's, as timm's `sgd` is.
        num_samples: that `lambda_max` was measured on.

    >>> print(rate_sentence(3.2, 2.02, momentum=0.9, num_samples=256))
    lr 3.2 is 1.7 times the stable rate (1.88: limit 3.8 of SGD with momentum 0.9, lambda_max 2.02
    on 256 samples)
    """
    where = "" if num_samples is None else f" on {num_samples} samples"
    if not lambda_max > 0:
        return (
            f"lr {lr:.3g}: no positive curvature was found (lambda_max {lambda_max:.3g}{where}), "
            "so it sets no limit"
        )
    limit = stability_limit(momentum=momentum, nesterov=nesterov)
    stable = limit / lambda_max
    kind = "SGD"
    if momentum:
        kind = f"{'Nesterov' if nesterov else 'SGD with'} momentum {momentum:g}"
    return (
        f"lr {lr:.3g} is {_times(lr / stable)} the stable rate ({stable:.3g}: limit {limit:.3g} of "
        f"{kind}, lambda_max {lambda_max:.3g}{where})"
    )


def rate_advice(lr: float, lambda_max: float, *, momentum: float, nesterov: bool) -> str:
    """The meaning of the ratio of `lr` and the stable rate; it claims no more than is known."""
    ratio = lr / stable_rate(lambda_max, momentum=momentum, nesterov=nesterov)
    if ratio <= 1:
        return "curvature allows it at these weights"
    return (
        "above it the steepest directions grow until the weights are where it is flatter, or the "
        "loss diverges. Networks often train at or slightly above the limit (the edge of "
        "stability), and warmup gives time to get there; large batches bear less early on"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 9.95 else f"{ratio:.0f} times"
