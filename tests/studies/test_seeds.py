"""How many seeds tell a difference from 0: the formula, and studies that are simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from lbaccel.errors import InputError
from lbaccel.studies.judging import Outcomes, judge
from lbaccel.studies.seeds import resolution, resolves, seeds_to_resolve


@given(st.integers(2, 40), st.floats(0.01, 5), st.floats(0, 0.99))
def test_the_resolution_is_the_half_width_at_the_expected_variance(n, spread, correlation):
    variance = spread**2 + spread**2 - 2 * correlation * spread**2
    truth = t.ppf(0.975, n - 1) * math.sqrt(variance / n)
    assert resolves(n, spread, correlation=correlation) == pytest.approx(truth)


def test_the_resolution_is_the_half_width_that_studies_come_to():
    """Simulated: the root mean square of the half-widths of many studies of 4 seeds."""
    rng, halves = np.random.default_rng(0), []
    for _ in range(2000):
        one, other = rng.normal(90, 0.4, (2, 4))
        found = judge(
            Outcomes(dict(enumerate(one))), Outcomes(dict(enumerate(other))), names=("A", "B")
        )
        halves.append((found.high - found.low) / 2)
    assert math.sqrt(np.mean(np.square(halves))) == pytest.approx(resolves(4, 0.4), rel=0.03)


@given(st.floats(0.05, 5), st.floats(0.01, 3))
def test_the_seeds_to_resolve_are_the_fewest(points, spread):
    n = seeds_to_resolve(points, spread)
    if n is None:
        assert resolves(10_000, spread) > points
    else:
        assert resolves(n, spread) <= points < resolves(n - 1, spread)


def test_the_sentence_on_resolution():
    assert resolution(3, 0.4) == (
        "With a standard deviation of 0.4 points a run, 3 seeds resolve 1.4 points, 5 seeds 0.7. "
        "To resolve 0.5 points, run 8 seeds."
    )
    assert "1 seed resolves nothing, 2 seeds resolve 5.1 points." in resolution(1, 0.4)
    assert resolution(10, 0.3).endswith("10 seeds resolve 0.3 points, 20 seeds 0.2.")
    assert "More than 10,000 seeds" in resolution(3, 100.0)


@pytest.mark.parametrize(
    ("n", "spread", "correlation", "says"),
    [
        (0, 0.4, 0.0, "num_seeds=0 is not a whole number of at least 1"),
        (3, -1.0, 0.0, "spread=-1.0"),
        (3, math.nan, 0.0, "spread=nan"),
        (3, 0.4, 1.0, "1 - correlation=0.0"),
    ],
)
def test_numbers_of_no_use_are_refused(n, spread, correlation, says):
    with pytest.raises(InputError, match=says):
        resolves(n, spread, correlation=correlation)
