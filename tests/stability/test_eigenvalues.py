"""Several eigenvalues by Lanczos' recursion, against matrices whose spectrum is known."""

from __future__ import annotations

import pytest
import torch

from lbaccel.errors import InputError
from lbaccel.stability.curvature import largest_eigenvalue
from lbaccel.stability.eigenvalues import largest_eigenvalues


def matrix_of(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def start(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("eigenvalues", [
    [9.0, 7.0, 3.0, 1.0, 0.5, 0.0, -2.0],
    [2.0, 1.5, 1.0, -50.0, -3.0],  # the largest in absolute value is negative
    [-0.5, -1.0, -7.0, -8.0],
    [4.0, 4.0, 4.0, 1.0],  # as often as it is there
    [0.0, 0.0, 0.0, 0.0],
    [3.0],
])  # fmt: skip
def test_the_largest_ones_are_those_of_the_matrix_and_in_order(eigenvalues):
    matrix = matrix_of(eigenvalues)
    found = largest_eigenvalues(
        lambda v: matrix @ v, start(len(eigenvalues)), count=3, tolerance=1e-10
    )
    assert found.values == pytest.approx(sorted(eigenvalues, reverse=True)[:3], abs=1e-9)
    assert max(found.residuals) < 1e-8


def test_an_eigenvalue_of_the_matrix_lies_within_each_residual_also_after_few_products():
    values = torch.linspace(-1, 1, 400, dtype=torch.float64) ** 3 * 10
    products = []

    def product(v):
        products.append(1)
        return values * v

    found = largest_eigenvalues(product, start(400), count=4, tolerance=1e-12, max_products=12)
    assert found.num_products == len(products) == 12 + 4
    assert max(found.residuals) > 1e-3  # it is not done
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert float((values - value).abs().min()) <= residual * (1 + 1e-9)


def test_no_copy_of_an_eigenvalue_appears_where_many_products_are_made_in_float32():
    """Without new orthogonalisation the largest one comes again after some 30 products."""
    values = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([5.0, 50.0, 500.0])])
    found = largest_eigenvalues(
        lambda v: values * v, start(len(values)).float(), count=4, tolerance=1e-7, max_products=90
    )
    assert found.values[:3] == pytest.approx([500.0, 50.0, 5.0], rel=1e-5)
    assert found.values[3] == pytest.approx(1.0, rel=1e-2)


def test_one_of_them_is_what_the_recursion_without_memory_finds():
    matrix = matrix_of([5.0, 4.5, 2.0, -9.0, 0.3, 0.1])
    one = largest_eigenvalue(lambda v: matrix @ v, start(6), tolerance=1e-9)
    found = largest_eigenvalues(lambda v: matrix @ v, start(6), count=1, tolerance=1e-9)
    assert found.values[0] == pytest.approx(one.value, rel=1e-8)


def test_numbers_of_no_use_are_refused():
    for options in ({"count": 0}, {"max_products": 0}, {"tolerance": 0.0}):
        with pytest.raises(InputError):
            largest_eigenvalues(lambda v: v, torch.ones(3), **options)
