"""Fewer points of a curve: its extremes and its ends stay, and the sum stays below a bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lbaccel.runs.thin import LEAST, fair_share, kept, kept_together, rounded

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=1, max_size=400)


@given(VALUES, st.integers(4, 100))
def test_the_extremes_and_the_ends_are_kept(values, most):
    places = kept(values, most)
    chosen = [values[i] for i in places]
    known = [value for value in values if value is not None]
    assert places == sorted(set(places))
    assert {0, len(values) - 1} <= set(places)
    if known:
        assert min(known) in chosen and max(known) in chosen
    assert len(places) <= max(most, 5)


@given(VALUES, st.integers(4, 100))
def test_a_gap_stays_a_gap(values, most):
    assert (None in values) == (None in [values[i] for i in kept(values, most)])


@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(20, 100))
def test_curves_that_are_drawn_together_keep_the_same_updates(curves, most):
    found = kept_together([list(enumerate(values)) for values in curves], most)
    for values, places in zip(curves, found, strict=True):
        chosen = [values[i] for i in places]
        known = [value for value in values if value is not None]
        assert len(places) <= most
        assert not known or {min(known), max(known)} <= set(chosen)
        assert {0, len(values) - 1} <= set(places)
    together = set().union(*found)
    for values, places in zip(curves, found, strict=True):
        assert places == sorted(i for i in together if i < len(values))


def test_a_short_curve_is_whole():
    assert kept([3.0] * 50, 50) == list(range(50))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50), st.integers(1, 100_000))
def test_shares_add_up_to_the_budget_at_most(lengths, budget):
    share = fair_share(lengths, budget)
    total = sum(min(length, share) for length in lengths)
    assert total <= max(budget, LEAST * len(lengths))
    if sum(lengths) <= budget:
        assert share >= max(lengths)


def test_a_number_that_is_not_finite_is_none():
    assert rounded(float("inf")) is None
    assert rounded(1234567.8) == 1234600
