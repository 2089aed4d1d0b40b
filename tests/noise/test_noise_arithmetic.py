"""The noise scale's arithmetic against closed forms and against gradients whose scale is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lbaccel.errors import InputError
from lbaccel.noise.arithmetic import (
    UNKNOWN,
    Interval,
    NoiseEstimate,
    RatioAverage,
    estimate,
    fieller,
    same_epoch,
)

DIMENSION = 40
STD = np.linspace(0.5, 1.5, DIMENSION)
S = float((STD**2).sum())


def estimates(mean, sizes, num_updates, rng):
    """Estimates of updates whose units' gradients are normal: mean G, covariance Sigma / n_i."""
    sizes = np.array(sizes, dtype=float)
    noise = rng.standard_normal((num_updates, len(sizes), DIMENSION)) * STD
    units = mean + noise / np.sqrt(sizes)[:, None]
    update = (units * sizes[:, None]).sum(1) / sizes.sum()
    return estimate(
        (sizes * (units**2).sum(-1)).sum(-1),
        (update**2).sum(-1),
        num_samples=sizes.sum(),
        num_units=len(sizes),
    )


def averaged(found, num_samples, half_life):
    average = RatioAverage(half_life)
    for s, g in zip(*found, strict=True):
        average.add(NoiseEstimate(float(s), float(g)), num_samples=num_samples)
    return average


@pytest.mark.parametrize(
    ("sizes", "half_life"),
    [((8,) * 8, math.inf), ((8, 8, 8, 8, 8, 3), math.inf), ((1, 30, 5, 12), 2000)],
)
def test_the_estimate_is_right_in_the_mean_and_its_interval_covers_the_truth(sizes, half_life):
    truth, num_seeds, covered, ratios = 100.0, 500, 0, []
    mean = np.full(DIMENSION, math.sqrt(S / truth / DIMENSION))
    num_samples = sum(sizes)
    half_life = 1e9 if half_life == math.inf else half_life
    for seed in range(num_seeds):
        found = estimates(mean, sizes, 200, np.random.default_rng(seed))
        average = averaged(found, num_samples, half_life)
        ratios.append(average.ratio)
        interval = average.interval()
        covered += interval.low <= truth <= interval.high
    assert abs(np.mean(ratios) / truth - 1) < 0.02
    assert covered >= 0.93 * num_seeds
    assert covered < 0.99 * num_seeds  # an interval that is far too wide would cover too


def test_both_estimates_are_unbiased_one_update_at_a_time():
    mean = np.full(DIMENSION, 0.3)
    for sizes in ((4, 4), (1, 2, 9), (5,) * 6):
        found = estimates(mean, sizes, 40_000, np.random.default_rng(1))
        for values, truth in zip(found, (S, float((mean**2).sum())), strict=True):
            error = values.std() / math.sqrt(len(values))
            assert abs(values.mean() - truth) < 4 * error
            assert 4 * error < 0.1 * truth  # so that a forgotten term of S / B would be seen


def test_without_noise_in_g_the_estimates_are_those_of_the_definition():
    """K = n_i = 2, B = 4: S is the sum of squares about the mean, times n_i, over K - 1."""
    units = np.array([[1.0, 2.0], [3.0, -2.0]])
    update = units.mean(0)
    found = estimate(
        float((2 * (units**2).sum(1)).sum()), float((update**2).sum()), num_samples=4, num_units=2
    )
    assert found.scale_s == pytest.approx(2 * ((units - update) ** 2).sum() / 1)
    assert found.grad_norm_sq == pytest.approx((update**2).sum() - found.scale_s / 4)


class Epochs:
    """Updates of B of N samples, in a new order each epoch; samples are vectors with mean G."""

    def __init__(self, size, num_samples, units, critical):
        rng = np.random.default_rng(5)
        samples = rng.standard_normal((size, DIMENSION)) * STD
        samples -= samples.mean(0)
        self.size, self.batch, self.units = size, num_samples, units
        self.s = float((samples**2).sum() / (size - 1))  # tr of the covariance with N - 1
        self.samples = samples + math.sqrt(self.s / critical / DIMENSION)
        self.rng = rng

    def updates(self, count, *, wrap):
        order = np.empty(0, dtype=int)
        for number in range(count):
            if not wrap:
                order = self.rng.permutation(self.size)
            while len(order) < self.batch:
                order = np.concatenate([order, self.rng.permutation(self.size)])
            rows, order = order[: self.batch], order[self.batch :]
            units = self.samples[rows].reshape(self.units, -1, DIMENSION).mean(1)
            sum_sq = float((units**2).sum() * self.batch / self.units)
            yield number * self.batch, sum_sq, float((units.mean(0) ** 2).sum())


@pytest.mark.parametrize("wrap", [False, True])
def test_drawing_without_replacement_reads_20_pct_high_until_it_is_corrected(wrap):
    """N = 2000, B = 1600, B_crit = N / 6: |G|^2 is short by S / N, its sixth: 6 / 5 = 1.2."""
    world = Epochs(2000, 1600, 8, 2000 / 6)
    plain, corrected = RatioAverage(1e12), RatioAverage(1e12)
    for start, sum_sq, update_sq in world.updates(1000, wrap=wrap):
        size = {"num_samples": 1600, "num_units": 8}
        plain.add(estimate(sum_sq, update_sq, **size), num_samples=1600)
        repeat = same_epoch(start, 1600, samples_per_epoch=2000) if wrap else 1.0
        found = estimate(sum_sq, update_sq, training_set_size=2000, repeat=repeat, **size)
        corrected.add(found, num_samples=1600)
    truth = 2000 / 6
    if wrap:
        # updates start at 0, 1600, 1200, 800, 400: two parts, b and 1600 - b, in four of five
        parts = [(1600,), (400, 1200), (800, 800), (1200, 400), (1600,)]
        shares = [sum(b * b for b in p) / 1600**2 for p in parts]
        assert [same_epoch(i * 1600, 1600, samples_per_epoch=2000) for i in range(5)] == shares
        share = float(np.mean(shares))  # S reads low, and |G|^2 by what is then left of the noise
        low = 1 - (1 - share) * 0.8 / 7
        expected = low / (1 + (1 - low) * truth / 1600 - share * truth / 2000)
        assert expected > 1.05
        assert plain.ratio / truth == pytest.approx(expected, abs=0.01)
    else:
        assert plain.ratio / truth == pytest.approx(1.20, abs=0.01)
    assert corrected.ratio / truth == pytest.approx(1.0, abs=0.01)
    assert corrected.scale_s / world.s == pytest.approx(1.0, abs=0.01)


def test_a_unit_that_crosses_an_epoch_end_takes_little_from_the_estimate():
    """Units of 200 of an update whose epoch ends inside one of them: the formula ignores that."""
    world = Epochs(2100, 1600, 8, 2100 / 6)
    average = RatioAverage(1e12)
    for start, sum_sq, update_sq in world.updates(1000, wrap=True):
        repeat = same_epoch(start, 1600, samples_per_epoch=2100)
        size = {"num_samples": 1600, "num_units": 8, "training_set_size": 2100}
        average.add(estimate(sum_sq, update_sq, repeat=repeat, **size), num_samples=1600)
    assert average.ratio / (2100 / 6) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("start", [0, 3, 9, 10, 25])
@pytest.mark.parametrize("size", [1, 4, 10, 23])
def test_the_share_of_pairs_in_one_epoch_is_that_of_counting_pairs(start, size):
    epochs = [position // 10 for position in range(start, start + size)]
    pairs = sum(a == b for a in epochs for b in epochs)
    assert same_epoch(start, size, samples_per_epoch=10) == pytest.approx(pairs / size**2)


def test_an_average_is_the_weighted_mean_over_samples_and_its_interval_is_fiellers():
    rng = np.random.default_rng(3)
    sizes = rng.integers(10, 50, 30)
    x, y = rng.normal(100, 20, 30), rng.normal(2, 0.3, 30)
    average = RatioAverage(300)
    for one in zip(x, y, sizes, strict=True):
        average.add(NoiseEstimate(*map(float, one[:2])), num_samples=int(one[2]))
    age = np.cumsum(sizes[::-1])[::-1] - sizes  # samples after each update
    w = sizes * 2.0 ** (-age / 300)
    w /= w.sum()
    n = 1 / (w**2).sum()
    mean_x, mean_y = (w * x).sum(), (w * y).sum()
    a, b = x - mean_x, y - mean_y
    var_x, cov, var_y = (float((w * p).sum() / (n - 1)) for p in (a * a, a * b, b * b))
    assert average.num_updates == pytest.approx(n)
    assert average.scale_s == pytest.approx(mean_x)
    assert average.grad_norm_sq == pytest.approx(mean_y)
    assert average.ratio == pytest.approx(mean_x / mean_y)
    t = stats.t.ppf(0.975, n - 1)
    found = average.interval()
    for rho in (found.low, found.high):  # its ends lie on the edge of the test
        spread = var_x - 2 * rho * cov + rho**2 * var_y
        assert (mean_x - rho * mean_y) ** 2 == pytest.approx(t**2 * spread)
    assert found.low < average.ratio < found.high


def test_an_average_with_equal_weights_has_the_sample_variance_over_n():
    values = [3.0, 5.0, 4.0, 8.0]
    average = RatioAverage(1e15)
    for value in values:
        average.add(NoiseEstimate(value, 1.0), num_samples=7)
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    found = average.interval()
    assert (found.low, found.high) == pytest.approx((5.0 - half, 5.0 + half))


def excluded(rho, x, y, var_x, var_y, cov, t):
    return (x - rho * y) ** 2 > t * t * (var_x - 2 * rho * cov + rho * rho * var_y)


def test_fiellers_interval_holds_exactly_the_ratios_that_the_test_does_not_exclude():
    rng = np.random.default_rng(11)
    grid = np.concatenate([np.linspace(0, 40, 4001), np.geomspace(40, 1e7, 400)])
    kinds = {"bounded": 0, "unbounded": 0, "unknown": 0}
    for _ in range(600):
        x, y = rng.normal(3, 3), rng.normal(1, 1)
        var_x, var_y = rng.exponential(1, 2)
        cov = rng.uniform(-0.95, 0.95) * math.sqrt(var_x * var_y)
        found = fieller(x, y, var_x=var_x, var_y=var_y, cov=cov, t=2.0)
        out = excluded(grid, x, y, var_x, var_y, cov, 2.0)
        if found.is_unknown:
            # all, none, or two pieces of the half line: no one interval
            inside = np.flatnonzero(~out)
            one_piece = len(inside) > 0 and (np.diff(inside) == 1).all() and len(inside) < len(grid)
            bounded_away = one_piece and y > 0 and x > 0
            assert not bounded_away or inside[0] == 0
            kinds["unknown"] += 1
            continue
        np.testing.assert_array_equal((grid >= found.low) & (grid <= found.high), ~out)
        kinds["bounded" if found.high < math.inf else "unbounded"] += 1
    assert min(kinds.values()) > 30, kinds


def test_an_interval_is_unbounded_where_the_gradient_is_not_seen_above_its_noise():
    found = fieller(100.0, 0.5, var_x=1.0, var_y=1.0, cov=0.0, t=2.0)
    assert 30 < found.low < 100 / 0.5 and found.high == math.inf
    assert fieller(1.0, 0.5, var_x=1.0, var_y=1.0, cov=0.0, t=2.0) == UNKNOWN


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(2613.0, 3790.0), "2,600 to 3,800"),
        (Interval(2613.0, math.inf), "2,600 to unbounded"),
        (Interval(0.0, 12.3), "0 to 12"),
        (UNKNOWN, "unknown"),
    ],
)
def test_an_interval_is_printed_so(interval, text):
    assert str(interval) == text


def test_nothing_is_known_before_two_updates_and_no_ratio_where_the_gradient_vanishes():
    average = RatioAverage(100)
    assert math.isnan(average.ratio) and average.interval() == UNKNOWN
    average.add(NoiseEstimate(5.0, 1.0), num_samples=10)
    assert average.ratio == 5.0 and average.interval() == UNKNOWN
    average.add(NoiseEstimate(5.0, -9.0), num_samples=10)
    assert average.ratio == math.inf
    average.add(NoiseEstimate(-500.0, 1.0), num_samples=10)
    assert math.isnan(average.ratio)


def test_a_saved_average_goes_on_exactly():
    first, second = RatioAverage(70), RatioAverage(70)
    for i in range(5):
        first.add(NoiseEstimate(float(i), 1.0 / (i + 1)), num_samples=10)
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.add(NoiseEstimate(2.5, 0.5), num_samples=3)
    assert first.state_dict() == second.state_dict() and first.interval() == second.interval()


@pytest.mark.parametrize("half_life", [0, -3.0, math.inf, True])
def test_a_half_life_that_is_no_number_of_samples_is_refused(half_life):
    with pytest.raises(InputError, match="half_life"):
        RatioAverage(half_life)
