"""The rules of a study's verdicts: closed forms, scipy's paired test, and slow references."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_rel

from lbaccel.studies.judging import (
    Outcomes,
    judge,
    paired,
)

NAMES = ("A", "B")
results = st.dictionaries(
    st.integers(0, 9), st.floats(50, 100).map(lambda x: round(x, 2)), min_size=2
)


def around(value, *, spread=0.0, seeds=3, start=0):
    """Results whose mean is `value`: one seed below, one at, one above it."""
    steps = np.linspace(-spread, spread, seeds)
    return Outcomes({start + i: value + step for i, step in enumerate(steps)})


def verdict(one, other, **more):
    return judge(one, other, names=NAMES, **more).verdict


@given(results, results)
def test_the_interval_is_that_of_scipys_paired_test(first, second):
    seeds = sorted(first.keys() & second.keys())
    found = judge(Outcomes(first), Outcomes(second), names=NAMES)
    assert list(found.per_seed) == seeds
    if len(seeds) < 2:
        assert (found.low, found.high, found.verdict) == (None, None, "not enough seeds")
        return
    differences = [first[s] - second[s] for s in seeds]
    assert found.difference == pytest.approx(fmean(differences))
    if max(differences) - min(differences) < 1e-9:
        return  # scipy divides by a standard error of 0
    truth = ttest_rel([first[s] for s in seeds], [second[s] for s in seeds])
    low, high = truth.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


def test_runs_are_paired_by_their_seed_and_not_by_their_order():
    one = Outcomes({0: 80.0, 1: 90.0, 2: 70.0})
    other = Outcomes({2: 70.5, 0: 80.5, 1: 90.5})
    assert paired(one, other) == {0: -0.5, 1: -0.5, 2: -0.5}
    found = judge(one, other, names=NAMES)
    assert (found.low, found.high) == (-0.5, -0.5)


@given(results, results)
def test_the_other_way_round_a_loss_is_a_gain(first, second):
    a, b = Outcomes(first), Outcomes(second)
    swapped = {"loss": "gain", "gain": "loss"}
    assert verdict(b, a) == swapped.get(verdict(a, b), verdict(a, b))


# the half-width of three seeds at d - e, d, d + e is t e / sqrt(3)
HALF = t.ppf(0.975, 2) / math.sqrt(3)


@pytest.mark.parametrize(
    ("difference", "half", "expected"),
    [
        (0.0, 0.49, "no loss"),
        (0.0, 0.51, "not resolved"),
        (-0.2, 0.29, "no loss"),  # to -0.49
        (-0.2, 0.31, "not resolved"),  # to -0.51, and it contains 0
        (-0.4, 0.3, "loss"),  # -0.7 to -0.1
        (-0.4, 0.05, "no loss"),  # resolved, and negligible
        (0.4, 0.05, "no loss"),
        (-1.6, 0.7, "loss"),
        (1.6, 0.7, "gain"),
        (-1.6, 1.7, "not resolved"),
    ],
)
def test_the_verdict_follows_the_interval(difference, half, expected):
    found = judge(
        around(90 + difference, spread=half / HALF),
        Outcomes({0: 90.0, 1: 90.0, 2: 90.0}),
        names=NAMES,
    )
    assert found.low == pytest.approx(difference - half)
    assert found.high == pytest.approx(difference + half)
    assert found.verdict == expected
    assert found.sentence.lower().startswith(f"{expected}: a is {abs(difference):.2f} points")


def test_a_resolved_and_negligible_difference_is_said_to_be_both():
    said = judge(around(89.6, spread=0.01), around(90.0), names=NAMES).sentence
    assert said == (
        "No loss: A is 0.40 points lower than B (mean of 3 paired seeds, 95 % interval -0.42 to "
        "-0.38). The interval lies inside ±0.5 points. The difference is resolved, and it is too "
        "small to count."
    )


def test_an_interval_that_says_nothing_names_the_seeds_that_would():
    found = judge(around(89.0, spread=1.0), around(90.0), names=NAMES)
    assert found.verdict == "not resolved"
    assert "The interval contains 0. With this spread, about 18 seeds resolve 0.5" in found.sentence
    # the differences have a standard deviation of 1: 2.1098 / sqrt(18) < 0.5 < 2.1199 / sqrt(17)
    assert t.ppf(0.975, 17) / math.sqrt(18) < 0.5 < t.ppf(0.975, 16) / math.sqrt(17)


def test_one_seed_gives_no_verdict():
    found = judge(Outcomes({0: 50.0}), around(90.0), names=NAMES)
    assert (found.verdict, found.difference, found.low) == ("not enough seeds", -40.0, None)
    assert "One seed gives no interval" in found.sentence
    assert "no seed has a result of both" in judge(Outcomes({}), around(9.0), names=NAMES).sentence


def test_a_place_with_a_diverged_seed_has_no_no_loss_and_no_gain():
    whole, hurt = around(90.0), Outcomes({0: 90.0, 1: 90.0}, frozenset({2}))
    assert verdict(whole, around(90.0)) == "no loss"
    assert verdict(hurt, whole) == "not resolved"
    assert verdict(Outcomes({0: 95.0, 1: 95.1}, frozenset({2})), whole) == "not resolved"
    assert verdict(Outcomes({0: 80.0, 1: 80.1}, frozenset({2})), whole) == "loss"
    said = judge(hurt, whole, names=NAMES).sentence
    assert said.endswith("1 of 3 runs of A diverged, and diverged runs count.")


def test_a_diverged_reference_makes_nothing_a_loss():
    hurt = Outcomes({0: 90.0, 1: 90.0}, frozenset({2}))
    assert verdict(around(80.0), hurt) == "not resolved"
    assert verdict(around(90.0), hurt) == "not resolved"
    assert verdict(around(95.0), hurt) == "gain"


def test_a_place_where_every_run_diverged_has_lost():
    none = Outcomes({}, frozenset({0, 1, 2}))
    assert verdict(none, around(90.0)) == "loss"
    assert verdict(around(90.0), none) == "gain"
    assert verdict(none, none) == "not enough seeds"
    assert verdict(Outcomes({}, frozenset({0})), around(90.0)) == "not enough seeds"
    assert "3 of 3 runs of A diverged" in judge(none, around(90.0), names=NAMES).sentence


def test_a_loss_is_better_where_it_is_lower_and_has_no_margin():
    low, high = around(0.2, spread=0.001), around(0.3, spread=0.001)
    assert verdict(low, high, metric="val/loss") == "gain"
    assert verdict(high, low, metric="val/loss") == "loss"
    found = judge(low, around(0.2, spread=-0.001), names=NAMES, metric="val/loss")
    assert found.verdict == "not resolved"
    assert "points" not in found.sentence
