"""AdaScale's arithmetic against its definition and against fairscale's convention."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from updates import cross_entropy

from lbaccel import BatchPlan, LargeBatch, UpdateLoader
from lbaccel.errors import InputError
from lbaccel.noise.arithmetic import NoiseEstimate, RatioAverage, estimate
from lbaccel.optim.adascale import AdaScale, adascale_gain, moments
from lbaccel.optim.scheduler import AdaScaleLR


def fairscales_gain(gradients):
    """fairscale's convention, written anew: losses divided by the number of units, and summed.

    A unit's hook sees g_i / S; its squares are *summed* over units and multiplied by S^2, the
    total is the *mean* gradient, and the variance is taken with S / cN and S / (cN - 1), cN = S.
    """
    scale = num_units = len(gradients)
    handed = [g / num_units for g in gradients]
    local = sum(float((h**2).sum()) for h in handed) * num_units**2
    total = float((sum(handed) ** 2).sum())
    variance = local * (scale / num_units) / (num_units - 1) - total * scale / (num_units - 1)
    square = total - variance / scale
    variance, square = max(variance, 1e-6), max(square, 0.0)
    return (variance + square) / (variance / scale + square)


@pytest.mark.parametrize("num_units", [2, 3, 4, 8, 31])
def test_the_closed_form_is_fairscales_gain(num_units):
    rng = np.random.default_rng(num_units)
    gradients = rng.normal(0.4, 1.0, (num_units, 50))
    unit_sq = [float((g**2).sum()) for g in gradients]
    gain = adascale_gain(*moments(unit_sq, float((gradients.mean(0) ** 2).sum())), num_units)
    assert gain == pytest.approx(fairscales_gain(list(gradients)), rel=1e-12)
    assert 1 < gain < num_units


def test_a_sum_where_the_mean_belongs_gives_another_gain():
    rng = np.random.default_rng(0)
    gradients = rng.normal(0.4, 1.0, (4, 50))
    unit_sq = [float((g**2).sum()) for g in gradients]
    right = adascale_gain(*moments(unit_sq, float((gradients.mean(0) ** 2).sum())), 4)
    wrong = adascale_gain(*moments(unit_sq, float((gradients.sum(0) ** 2).sum())), 4)
    assert abs(wrong / right - 1) > 0.1


def test_the_gain_of_known_gradients_by_hand():
    """(1, 2) and (3, 4): their mean (2, 3); sigma^2 = 5 + 25 - 26 = 4, mu^2 = 13 - 4 / 2 = 11."""
    assert moments([5.0, 25.0], 13.0) == (4.0, 11.0)
    assert adascale_gain(4.0, 11.0, 2) == pytest.approx(15 / 13)


def test_moments_are_unbiased():
    rng = np.random.default_rng(1)
    mean, std = np.array([0.5, -1.0, 0.2]), np.array([1.0, 2.0, 0.5])
    found = []
    for _ in range(20_000):
        g = mean + std * rng.standard_normal((4, 3))
        found.append(moments((g**2).sum(1).tolist(), float((g.mean(0) ** 2).sum())))
    for values, truth in zip(np.array(found).T, ((std**2).sum(), (mean**2).sum()), strict=True):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))


def test_the_gain_lies_between_1_and_the_scale_and_grows_with_the_noise():
    draw = random.Random(2)
    for _ in range(500):
        scale = draw.choice([1.0, 1.5, 2.0, 64.0])
        sigma2, mu2 = draw.expovariate(1), draw.choice([0.0, draw.expovariate(1)])
        gain = adascale_gain(sigma2, mu2, scale)
        assert 1 - 1e-12 <= gain <= scale * (1 + 1e-12)
        assert adascale_gain(2 * sigma2, mu2, scale) >= gain * (1 - 1e-12)
        assert adascale_gain(sigma2, mu2, 1 / scale) <= 1 + 1e-12
    assert adascale_gain(0.0, 0.0, 8) == 1.0 and adascale_gain(0.0, 0.0, 0.5) == 0.5
    assert adascale_gain(1.0, -3.0, 8) == 8.0 and adascale_gain(-1.0, 3.0, 8) == 1.0


def test_units_of_the_base_batch_give_the_gain_that_the_noise_scale_gives():
    """sigma^2 = S / B0: both estimates of one update are the same numbers."""
    rng = np.random.default_rng(7)
    g = rng.normal(0.3, 1.0, (6, 20))
    base, unit_sq, mean_sq = 32, (g**2).sum(1), float((g.mean(0) ** 2).sum())
    average = RatioAverage(1e9)
    found = estimate(base * float(unit_sq.sum()), mean_sq, num_samples=6 * base, num_units=6)
    average.add(NoiseEstimate(*found), num_samples=6 * base)
    gain = AdaScale(base).gain(average, 6 * base)
    assert gain == pytest.approx(adascale_gain(*moments(unit_sq.tolist(), mean_sq), 6))


def test_progress_is_the_sum_of_gains_and_is_saved():
    average, rule = RatioAverage(1e9), AdaScale(10)
    assert rule.gain(average, 80) == 1.0  # nothing is known yet
    rule.advance(1.0)
    average.add(NoiseEstimate(30.0, 1.0), num_samples=80)
    gain = rule.gain(average, 30)
    assert gain == pytest.approx((3 + 1) / (3 / 3 + 1))
    rule.advance(gain)
    assert rule.progress == 3.0
    other = AdaScale(10)
    other.load_state_dict(rule.state_dict())
    assert other.progress == 3.0


def test_a_dropped_update_moves_no_progress_and_takes_its_samples():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages, asked = RatioAverage(1e9), []
    averages.add(NoiseEstimate(30.0, 1.0), num_samples=8)

    def size(update):
        asked.append(update)
        return 8 if update < 3 else 4

    scheduler = AdaScaleLR(
        optimizer,
        lambda samples: 1.0 / (1.0 + samples),
        rule=AdaScale(4),
        averages=averages,
        sizes=size,
        total_samples=1e9,
    )
    gain = scheduler.gain  # sigma^2 = 30 / 4, mu^2 = 1, S = 2
    assert gain == pytest.approx((7.5 + 1) / (7.5 / 2 + 1))
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    drops = {1, 2}
    large_batch = LargeBatch(Accelerator(cpu=True), plan, drops=lambda loss, u: u in drops)
    data = [(torch.randn(3), i % 2) for i in range(32)]
    *_, loader, _ = large_batch.prepare(model, optimizer, UpdateLoader(data, plan), scheduler)
    found, rates = [], []
    for update in loader:
        result = large_batch.update(update, cross_entropy)
        found.append((result.dropped, scheduler.rule.progress))
        rates.append(optimizer.param_groups[0]["lr"])
    # The last of them has 4 samples, a scale of 1 and so a gain of 1.
    truth = [(False, gain), (True, gain), (True, gain), (False, gain + 1)]
    assert found == [(dropped, pytest.approx(t)) for dropped, t in truth]
    assert asked == [0, 1, 2, 3, 4] and scheduler.num_updates == large_batch.num_updates == 4
    assert rates[1] == pytest.approx(0.1 * gain / (1 + 4 * gain)) == rates[0]


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match="scale"):
        adascale_gain(1.0, 1.0, 0)
    with pytest.raises(InputError, match="needs finite numbers"):
        adascale_gain(math.nan, 1.0, 2)
    with pytest.raises(InputError, match="at least two"):
        moments([1.0], 1.0)
    with pytest.raises(InputError, match="base_batch_size"):
        AdaScale(0)
    with pytest.raises(InputError, match="gain"):
        AdaScale(1).advance(-1.0)


def test_the_gain_of_extreme_moments_is_that_of_their_ratio():
    tiny = 5e-324
    assert adascale_gain(1e308, 1e308, 2) == pytest.approx(2 / 1.5)
    assert (adascale_gain(tiny, 0.0, 8), adascale_gain(0.0, tiny, 8)) == (8.0, 1.0)
    with pytest.raises(InputError, match="finite"):
        adascale_gain(math.inf, 1.0, 2)
