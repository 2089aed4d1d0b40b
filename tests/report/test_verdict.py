"""The first sentences of a report: values over seeds, and differences seed by seed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lbaccel.report.verdict import (
    LAST,
    judged,
    num_last,
    outcomes_of,
    sentences,
    value_of,
)
from lbaccel.runs.groups import groups_of
from lbaccel.runs.read import Point, Run


def a_run(name, *values, status="done", metric="val/top1", **config):
    points = tuple(Point(u, 64 * u, u / 10, value) for u, value in enumerate(values, 1))
    return Run(name, config, {"status": status}, {metric: points}, "folder")


def steady(name, level, status="done", **config):
    """Ten evaluations that end at a level, with one that is far better before the last five."""
    return a_run(name, *[level - 5] * 4, level + 3, *[level] * 5, status=status, **config)


@pytest.fixture
def two_groups():
    a = [steady(f"a{s}", v, seed=s, lr=0.1) for s, v in enumerate((90.0, 91.0, 95.0))]
    b = [steady(f"b{s}", v, seed=s, lr=0.4) for s, v in enumerate((91.0, 91.8, 96.2))]
    return groups_of([*a, *b])


def test_the_value_of_a_run_is_the_median_of_its_last_evaluations_and_not_its_best():
    one = a_run("a", *range(50, 60), 99.0, 10.0, 70.0, 71.0, 72.0)
    assert value_of(one, "val/top1", LAST) == 71.0


def test_a_run_with_few_evaluations_gives_its_last_one():
    runs = [steady("a", 90.0), a_run("b", 1.0, 2.0, 3.0)]
    assert num_last(runs, "val/top1") == 1
    assert num_last(runs[:1], "val/top1") == LAST


@pytest.mark.parametrize("status", ["failed", "stopped", "unfinished"])
def test_a_run_that_did_not_end_has_no_value(status):
    assert value_of(a_run("a", *[90.0] * 10, status=status), "val/top1", LAST) is None


def test_a_run_that_diverged_has_no_value():
    assert value_of(a_run("a", *[90.0] * 9, None), "val/top1", LAST) is None


def test_two_runs_of_a_seed_count_once():
    (group,) = groups_of([steady("a", 90.0, seed=0), steady("b", 92.0, seed=0)])
    assert outcomes_of(group, "val/top1", LAST).values == {0: 91.0}


def test_a_difference_is_of_pairs_and_its_interval_students(two_groups):
    first, second = two_groups
    found = judged(second, first, "val/top1", LAST)
    gaps = [1.0, 0.8, 1.2]
    assert list(found.per_seed.values()) == pytest.approx(gaps)
    expected = scipy.stats.t.interval(0.95, 2, loc=np.mean(gaps), scale=scipy.stats.sem(gaps))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.verdict == "gain"


def test_seeds_that_only_one_group_has_are_left_out_of_a_difference():
    groups = groups_of([
        steady("a", 90.0, seed=0, lr=1), steady("b", 80.0, seed=1, lr=1),
        steady("c", 91.0, seed=1, lr=2), steady("d", 70.0, seed=2, lr=2),
    ])  # fmt: skip
    assert judged(groups[1], groups[0], "val/top1", LAST).per_seed == {1: 11.0}


def test_a_seed_that_diverged_counts_as_such(two_groups):
    gone = steady("b9", 91.0, status="failed", seed=9, lr=0.4)
    gone = Run(gone.name, gone.config, {**gone.summary, "diverged": True}, gone.history, "folder")
    nan = a_run("b8", *[90.0] * 9, None, seed=8, lr=0.4)
    groups = groups_of([*two_groups[0].runs, *two_groups[1].runs, gone, nan])
    assert outcomes_of(groups[1], "val/top1", LAST).diverged == {8, 9}
    assert judged(groups[1], groups[0], "val/top1", LAST).verdict == "not resolved"  # not a gain


def test_the_first_sentence_says_value_interval_difference_and_pairing(two_groups):
    first = sentences(two_groups, "val/top1", LAST)[0]
    values = [91.0, 91.8, 96.2]
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert first == (
        f"Group 2 (lr=0.4) reaches 93.00 % val/top1 (mean of 3 seeds, {low:.2f} to {high:.2f}), "
        "1.00 points above group 1 (lr=0.1): 0.50 to 1.50, paired by 3 seeds (resolved)."
    )


def test_of_a_loss_the_lowest_comes_first():
    runs = [
        a_run(f"{lr}", *[v] * 10, metric="val/loss", seed=0, lr=lr)
        for lr, v in [(1, 3.0), (2, 2.0)]
    ]
    first = sentences(groups_of(runs), "val/loss", LAST)[0]
    assert first.startswith("Run 2 (lr=2) reaches 2 val/loss (1 seed), 1 below run 1 (lr=1)")
    assert "not enough seeds" in first


def test_groups_without_a_common_seed_are_not_paired():
    runs = [steady("a", 90.0, seed=0, lr=1), steady("b", 91.0, seed=1, lr=2)]
    assert "share no seed" in sentences(groups_of(runs), "val/top1", LAST)[0]


def test_the_best_of_three_groups_is_said_to_be_chosen(two_groups):
    groups = [*two_groups, *groups_of([steady("c", 80.0, seed=0, lr=9)])]
    assert "chosen out of 3 groups" in sentences(groups, "val/top1", LAST)[1]
    assert not any("chosen" in line for line in sentences(two_groups, "val/top1", LAST))


def test_runs_of_which_none_ended_have_no_verdict():
    lines = sentences(groups_of([steady("a", 90.0, status="failed")]), "val/top1", LAST)
    assert lines == [
        "No run has come to its end with a val/top1 that is finite.",
        "So far its val/top1 is 90.00 % (update 10).",
    ]
