"""The first evaluation that reaches a value."""

import math

import pytest

from lbaccel.runs.target import TargetWatch


def at(update):
    return {"update": update, "samples_seen": 10 * update, "perf/seconds": 0.5 * update}


def test_the_first_reaching_is_noted_and_no_later_one():
    watch = TargetWatch(70.0)
    for update, value in enumerate((60.0, math.nan, 70.0, 90.0), 1):
        watch.after_evaluation(at(update), {"val/top1": value})
    assert watch.summary() == {
        "target": 70.0,
        "target_update": 3,
        "target_samples": 30,
        "target_seconds": 1.5,
    }
    assert watch.line == {"target/top1": 70.0}


def test_a_loss_is_reached_from_above():
    watch = TargetWatch(0.5, "val/loss")
    watch.after_evaluation(at(1), {"val/loss": 0.6})
    assert watch.summary()["target_update"] is None
    watch.after_evaluation(at(2), {"val/loss": 0.5})
    assert watch.summary()["target_update"] == 2
    assert watch.line == {"target/loss": 0.5}


def test_without_a_target_nothing_is_said():
    watch = TargetWatch()
    watch.after_evaluation(at(1), {"val/top1": 99.0})
    assert watch.summary() == watch.line == {}


@pytest.mark.parametrize(("value", "reached"), [(70.0, 1), (80.0, None)])
def test_a_resume_knows_it_again_and_another_target_starts_afresh(value, reached):
    watch = TargetWatch(70.0)
    watch.after_evaluation(at(1), {"val/top1": 75.0})
    resumed = TargetWatch(value)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.summary()["target_update"] == reached
