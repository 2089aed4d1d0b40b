"""Several of the largest eigenvalues of a symmetric matrix that is known by its products alone.

`curvature.largest_eigenvalue` keeps three vectors and finds one; further ones need the earlier
vectors of the recursion, since rounding would bring back copies of those that have converged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lbaccel.errors import check_number, check_whole
from lbaccel.stability.curvature import Product

_RESTART_SEED = 0x1A2F


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues, in descending order.

    Args:
        values: [k].
        residuals: [k], |A x - value x| of the unit vector x that belongs to each, measured by a
            product of its own: an eigenvalue of A lies this near to the value.
        num_products: of all, those for the residuals too.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    num_products: int


def largest_eigenvalues(
    product: Product,
    start: Tensor,
    *,
    count: int = 1,
    tolerance: float = 0.05,
    max_products: int = 60,
) -> Eigenvalues:
    """The `count` largest (not the largest absolute) eigenvalues, by Lanczos' recursion.

        w = A q_k - a_k q_k - b_k q_(k-1),   a_k = q_k . A q_k,   b_(k+1) q_(k+1) = w,   |q_k| = 1

    Each w is made orthogonal to all earlier q twice (Giraud et al. 2005: then no copy of an
    eigenvalue appears), so that `max_products` vectors of the matrix's size are kept. The
    eigenvalues t of the tridiagonal matrix of a and b approach A's from below; with s an
    eigenvector, |A x - t x| = b_(k+1) |s_k|. Where w is zero the recursion goes on from a new
    random vector, so that an eigenvalue of a small matrix comes as often as it is there; of a large
    one, copies of a multiple eigenvalue may be missing.

    Args:
        product: v [n] -> A v [n].
        start: [n], of any direction; a random one meets every eigenvector.
        count: of eigenvalues; no more than n are given.
        tolerance: end where the residual of each is at most this share of the largest |t|.
        max_products: end after so many; those for the residuals come on top, `count` of them.

    >>> diagonal = torch.tensor([3.0, 1.0, -8.0, 2.0], dtype=torch.float64)
    >>> found = largest_eigenvalues(lambda v: diagonal * v, torch.ones_like(diagonal), count=2)
    >>> [round(value, 6) for value in found.values]
    [3.0, 2.0]
    """
    check_whole("count", count)
    check_whole("max_products", max_products)
    check_number("tolerance", tolerance)
    n = len(start)
    count = min(count, n)
    most = min(n, max(max_products, count))
    generator = torch.Generator().manual_seed(_RESTART_SEED)
    q, kept = start / torch.linalg.vector_norm(start), []
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        kept.append(q)
        w = product(q)
        diagonal.append(float(torch.dot(w, q)))
        w = _orthogonal(w, kept)
        norm, done = float(torch.linalg.vector_norm(w)), len(kept)
        low = max(0, done - count)
        values, vectors = eigh_tridiagonal(
            diagonal, beside, select="i", select_range=(low, done - 1), check_finite=True
        )
        largest = max(map(abs, (*diagonal, *beside)))
        is_zero = norm <= 10 * torch.finfo(start.dtype).eps * largest
        near = norm * abs(vectors[-1]).max() <= tolerance * abs(values).max()
        if done == most or (near and not is_zero and done >= count):
            break
        if is_zero:
            drawn = torch.randn(n, generator=generator, dtype=torch.float64)
            w = _orthogonal(drawn.to(start), kept)
            beside.append(0.0)
            q = w / torch.linalg.vector_norm(w)
        else:
            beside.append(norm)
            q = w / norm
    found = tuple(float(value) for value in values[::-1])
    residuals = tuple(
        _residual(product, value, column, kept)
        for value, column in zip(found, vectors.T[::-1], strict=True)
    )
    return Eigenvalues(found, residuals, len(kept) + len(found))


def _residual(product: Product, value: float, column: Any, kept: list[Tensor]) -> float:
    """|A x - value x| of the unit vector x that has these coordinates in the kept vectors."""
    parts = (float(s) * q for s, q in zip(column, kept, strict=True))
    x = sum(parts, torch.zeros_like(kept[0]))
    x = x / torch.linalg.vector_norm(x)
    return float(torch.linalg.vector_norm(product(x) - value * x))


def _orthogonal(w: Tensor, kept: list[Tensor]) -> Tensor:
    for _ in range(2):
        for q in kept:
            w = w - torch.dot(w, q) * q
    return w
