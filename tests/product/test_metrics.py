"""Figures against closed forms and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lbaccel.errors import RunFailed
from lbaccel.product.metrics import (
    calibration,
    calibration_error,
    confidence_of,
    figures_of,
    fit_temperature,
)
from lbaccel.product.shares import mcnemar, wilson

NAMES = tuple("abcdefg")


def random_case(seed=0, n=200, outputs=7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, outputs)) * 2
    labels = rng.integers(0, outputs - 1, n)  # the last class has no image
    return logits, labels, logits.argmax(1)


def test_the_figures_are_those_of_slow_loops():
    logits, labels, predicted = random_case()
    found = figures_of(logits, labels, predicted, classes=NAMES, num_named=7)
    right = [p == t for p, t in zip(predicted, labels, strict=True)]
    assert found.top1 == sum(right) / 200
    assert found.top1_pct == 100 * sum(right) / 200
    ranks = [sorted(-row).index(-row[t]) for row, t in zip(logits, labels, strict=True)]
    assert found.top5 == sum(rank < 5 for rank in ranks) / 200
    losses = [
        math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(logits, labels, strict=True)
    ]
    assert found.loss == pytest.approx(sum(losses) / 200, rel=1e-12)
    recalls, f1s = [], []
    for c, row in enumerate(found.classes):
        of_class = [p == c for p, t in zip(predicted, labels, strict=True) if t == c]
        said = [t == c for p, t in zip(predicted, labels, strict=True) if p == c]
        assert row.n == len(of_class)
        assert row.recall == (sum(of_class) / len(of_class) if of_class else None)
        assert row.precision == (sum(said) / len(said) if said else None)
        f1s.append(2 * sum(said) / (len(said) + len(of_class)))
        assert row.f1 == pytest.approx(f1s[-1])
        recalls += [sum(of_class) / len(of_class)] if of_class else []
        if of_class:
            assert (row.low, row.high) == wilson(sum(of_class), len(of_class))
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert found.macro_f1 == pytest.approx(np.mean(f1s))  # the last class is predicted too
    most = np.bincount(labels).argmax()
    assert (found.majority_class, found.majority) == (NAMES[most], np.mean(labels == most))
    matrix = found.matrix(7)
    for c in range(7):
        for p in range(7):
            assert matrix[c, p] == sum((labels == c) & (predicted == p))
    assert (found.confusion[:, 2] > 0).all()


def test_five_outputs_or_fewer_have_no_top_5():
    logits, labels, predicted = random_case(outputs=5)
    found = figures_of(logits, labels, predicted, classes=NAMES[:5], num_named=5)
    assert found.top5 is None


def test_an_output_without_a_name_is_wrong_and_no_class_of_the_table():
    logits = np.array([[0.0, 1.0, 5.0], [3.0, 0.0, 0.0]])
    found = figures_of(
        logits, np.array([1, 0]), logits.argmax(1), classes=("a", "b", "output 2"), num_named=2
    )
    assert found.num_right == 1
    assert [row.name for row in found.classes] == ["a", "b"]
    assert found.classes[1].precision is None
    assert found.matrix(3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_wilsons_interval_is_its_closed_form():
    z, k, n = 1.959963984540054, 31, 43
    share = k / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert wilson(k, n) == pytest.approx((middle - half, middle + half), rel=1e-9)


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(3)
    confidence, right = rng.uniform(0.2, 1, 500), rng.random(500) < 0.7
    confidence[0], confidence[1] = 1.0, 1 / 15  # ends of bins belong to the lower one
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / 500 * gap
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-10)


def halves(first, second, margin=4.0, n=400):
    """Logits (margin, 0): at even places the share `first` is right, at odd ones `second`."""
    logits = np.tile([margin, 0.0], (n, 1))
    labels = np.ones(n, dtype=np.int64)
    for start, share in ((0, first), (1, second)):
        places = np.arange(start, n, 2)
        labels[places[: round(share * len(places))]] = 0
    return logits, labels


def test_the_temperature_is_the_one_that_minimises_the_loss():
    # softmax((a, 0) / T) is the share r of right ones at T = a / ln(r / (1 - r))
    logits, labels = halves(0.8, 0.8)
    assert fit_temperature(logits, labels) == pytest.approx(4 / math.log(4), rel=1e-4)
    predicted = np.zeros(400, dtype=np.int64)
    assert confidence_of(logits, predicted, temperature=4 / math.log(4)) == pytest.approx(0.8)


def test_a_half_is_measured_with_the_temperature_of_the_other_half():
    logits, labels = halves(0.7, 0.9)
    found = calibration(logits, labels, np.zeros(400, dtype=np.int64))
    # fitted on themselves, both halves would have no error; crossed, each is off by 0.2
    assert found.error_after == pytest.approx(0.2, abs=1e-4)
    assert found.temperature == pytest.approx(4 / math.log(4), rel=1e-4)  # of all: 0.8 are right
    assert found.error == pytest.approx(1 / (1 + math.exp(-4)) - 0.8, abs=1e-9)


def test_mcnemars_test_in_words():
    first = np.array([True] * 12 + [False] * 31 + [True] * 50)
    second = np.array([False] * 12 + [True] * 31 + [True] * 50)
    found = mcnemar(first, second)
    exact = 2 * sum(math.comb(43, k) for k in range(13)) / 2**43
    assert found.p == pytest.approx(exact, rel=1e-9)
    assert str(found) == "B is right on 31 that A misses, wrong on 12 that A has: p = 0.0054"


def test_two_models_that_are_right_on_the_same_images_do_not_differ():
    right = np.array([True, False])
    assert mcnemar(right, right).p == 1
    assert str(mcnemar(right, right)) == "A and B are right on the same images"


def test_outputs_that_are_not_finite_end_in_a_sentence():
    logits = np.array([[0.0, 1.0], [np.nan, 0.0]])
    with pytest.raises(RunFailed, match="no finite numbers for 1 of 2 images"):
        figures_of(logits, np.array([0, 1]), np.array([1, 0]), classes="ab", num_named=2)
