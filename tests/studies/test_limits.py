"""How far an arm scales, and its interquartile mean: slow references and scipy's bootstrap."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, trim_mean

from lbaccel.studies.judging import Outcomes
from lbaccel.studies.limits import interquartile_mean, scaling_limit


def around(value, *, spread=0.0, seeds=3, start=0):
    """Results whose mean is `value`: one seed below, one at, one above it."""
    steps = np.linspace(-spread, spread, seeds)
    return Outcomes({start + i: value + step for i, step in enumerate(steps)})


def limit(places, points=0.5, base=32):
    return scaling_limit(places, base=base, points=points, title="linear", metric="val/top1")


def test_the_scaling_limit_is_the_last_batch_before_the_first_loss():
    places = {
        32: around(90.0),
        64: around(89.9),
        128: around(89.4),  # 0.6 points
        256: around(89.9),  # back within, and behind the loss
        512: around(88.8),
    }
    half, one = limit(places), limit(places, points=1.0)
    assert (half.batch, half.factor, half.resolved) == (64, 2.0, True)
    assert (one.batch, one.factor, one.resolved) == (256, 8.0, True)
    assert half.sentence == (
        "linear: within 0.5 points of batch 32 up to batch 64, a factor of 2. The intervals "
        "resolve it. At batch 128 it is 0.60 points lower."
    )
    assert limit(places, base=128).batch == 256


def test_a_limit_by_means_alone_is_said_to_be_unresolved():
    found = limit({32: around(90.0), 64: around(89.9, spread=1.0)})
    assert (found.batch, found.resolved) == (64, False)
    assert (
        "not resolved: at batch 64 the interval of 3 seeds reaches -2.58 points" in found.sentence
    )
    assert found.sentence.endswith("No larger batch was run.")
    alone = limit({32: Outcomes({0: 90.0}), 64: Outcomes({0: 90.0})})
    assert (alone.batch, alone.resolved) == (64, False)
    assert "One seed gives no interval" in alone.sentence


def test_a_diverged_run_ends_the_scaling():
    places = {32: around(90.0), 64: Outcomes({0: 90.0, 1: 90.0}, frozenset({2}))}
    found = limit(places)
    assert (found.batch, found.factor) == (32, 1.0)
    assert "At batch 64 1 of 3 runs of this arm diverged" in found.sentence
    assert limit({32: Outcomes({}, frozenset({0})), 64: around(9.0)}).batch is None
    assert limit({64: around(9.0)}).batch is None


def test_a_batch_without_a_result_ends_the_scaling():
    found = limit({32: around(90.0), 64: Outcomes({}), 128: around(90.0)})
    assert found.batch == 32
    assert found.sentence.endswith("Batch 64 has no result yet.")


@given(st.lists(st.lists(st.floats(0, 100), min_size=2, max_size=5), min_size=1, max_size=5))
def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end(places):
    values = sorted(value for place in places for value in place)
    cut = len(values) // 4
    found = interquartile_mean(places)
    assert found.value == pytest.approx(fmean(values[cut : len(values) - cut]))
    assert found.num_runs == len(values)
    assert found.low <= found.high


def test_the_bootstrap_draws_the_seeds_of_each_batch_size_by_themselves():
    # each batch size has no spread, so no resample has any
    found = interquartile_mean([[88.0] * 3, [80.0] * 3])
    assert (found.low, found.high) == (84.0, 84.0)
    # of one batch size it is scipy's own
    values = np.random.default_rng(1).normal(90, 1, 12)
    truth = bootstrap(
        (values,),
        lambda x, axis: trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(2),
    ).confidence_interval
    found = interquartile_mean([values])
    assert (found.low, found.high) == pytest.approx(tuple(truth), abs=0.1)


def test_one_seed_has_an_interquartile_mean_and_no_interval():
    found = interquartile_mean([[88.0], [80.0, 82.0]])
    assert (found.low, found.high, found.num_runs) == (None, None, 3)
    assert interquartile_mean([[], []]) is None
