"""The first evaluation that reaches a value."""

import json
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


@pytest.mark.parametrize(
    ("value", "metric", "reached"),
    [
        (70.0, "val/top1", 2),
        (75.0, "val/top1", 3),
        (60.0, "val/top1", 1),
        (90.0, "val/top1", None),
        (0.5, "val/loss", 1),
    ],
)
@pytest.mark.parametrize("before", [70.0, None])
def test_a_resume_towards_another_target_knows_the_evaluations_of_before(
    before, value, metric, reached
):
    watch = TargetWatch(before)
    for update, top in enumerate((65.0, 71.0, 80.0), 1):
        watch.after_evaluation(at(update), {"val/top1": top, "val/loss": 0.5, "perf/x": 1.0})
    resumed = TargetWatch(value, metric)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    resumed.after_evaluation(at(4), {"val/top1": 85.0, "val/loss": 0.1})
    seconds = None if reached is None else 0.5 * reached
    assert resumed.summary() == {
        "target": value,
        "target_update": reached,
        "target_samples": None if reached is None else 10 * reached,
        "target_seconds": seconds,
    }
