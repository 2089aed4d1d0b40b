"""The one number that a run gives a study."""

from lbaccel.runs.read import Point
from lbaccel.studies.outcome import final_value


def points(*values):
    return [Point(update, update, None, value) for update, value in enumerate(values)]


def test_it_is_the_median_of_the_last_evaluations_and_never_the_best():
    assert final_value(points(99.0, 70.0, 71.0, 75.0, 72.0, 73.0), last=5) == 72.0
    assert final_value(points(70.0, 72.0), last=5) == 71.0
    assert final_value(points(1.0, 2.0, 3.0), last=1) == 3.0


def test_a_value_that_is_not_finite_leaves_none():
    assert final_value(points(70.0, None, 71.0), last=2) is None
    assert final_value(points(None, 70.0, 71.0), last=2) == 70.5
    assert final_value([], last=5) is None
