"""Keskar et al.'s sharpness: how far the loss rises in a small box around the weights.

Keskar et al. 2017, "On Large-Batch Training for Deep Learning: Generalization Gap and Sharp Minima"
(arXiv 1609.04836), metric 2.1 and equations 3 and 4, with A = I: the box has all dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from torch import Tensor

from lbaccel.errors import RunFailed, check_number, check_whole

Loss = Callable[[Tensor], tuple[float, Tensor]]
ITERATIONS = 10  # of L-BFGS-B, as in the paper


@dataclass(frozen=True)
class BoxSharpness:
    """The largest loss that was met in the box, and Keskar's measure of it.

    Args:
        epsilon: of the box.
        loss: f(x), at its centre.
        max_loss: the largest that L-BFGS-B met: a lower bound of the maximum.
        num_gradients: evaluations of loss and gradient.
    """

    epsilon: float
    loss: float
    max_loss: float
    num_gradients: int

    @property
    def sharpness(self) -> float:
        """100 (max f - f(x)) / (1 + f(x))."""
        return 100 * (self.max_loss - self.loss) / (1 + self.loss)


def box_sharpness(
    loss: Loss,
    weights: Tensor,
    *,
    epsilon: float = 1e-3,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> BoxSharpness:
    """The largest loss in the box around the weights, by L-BFGS-B.

        phi = 100 (max over z in C of f(x + z) - f(x)) / (1 + f(x)),
        C = {z: |z_i| <= epsilon (|x_i| + 1)}

    L-BFGS-B of scipy is run as the paper runs it, for 10 iterations, from two points: from x, as
    the paper does, and from a random point of the box, since the gradient at x may be zero. The
    larger of both counts. It works on vectors in float64, of which it keeps about 25.

    Args:
        loss: w [n] -> f(w) and its gradient [n].
        weights: x, [n].
        epsilon: 1e-3, or 5e-4 as the paper has it too.
        iterations: from each of the two points.
        seed: of the random point.

    Raises:
        RunFailed: the loss is not finite at x.

    >>> def loss(w):
    ...     return float(w.square().sum() / 2), w
    >>> found = box_sharpness(loss, torch.zeros(3, dtype=torch.float64), epsilon=0.1)
    >>> round(found.max_loss, 9)  # 3 x 0.1^2 / 2, in a corner
    0.015
    """
    check_number("epsilon", epsilon)
    check_whole("iterations", iterations)
    x = weights.detach().to("cpu", torch.float64).numpy()
    reach = epsilon * (np.abs(x) + 1)
    low: Any = x - reach
    high: Any = x + reach
    box, options = Bounds(low, high), {"maxiter": iterations}
    best, count = -np.inf, 0

    def fallen(w: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        nonlocal best, count
        value, gradient = loss(torch.from_numpy(w).to(weights))
        count += 1
        if not np.isfinite(value):  # no rise there: the search takes a shorter step
            return -centre, np.zeros_like(w)
        best = max(best, value)
        return -value, -gradient.detach().to("cpu", torch.float64).numpy()

    centre, _ = loss(weights)
    if not np.isfinite(centre):
        raise RunFailed("the loss is not finite at these weights, so their sharpness is not known.")
    drawn = np.random.default_rng(seed).uniform(-1, 1, len(x))
    for start in (x, x + reach * drawn):
        minimize(fallen, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
    return BoxSharpness(epsilon, centre, max(float(best), centre), count + 1)
