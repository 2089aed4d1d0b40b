from __future__ import annotations

import numpy as np
from scipy import stats

from lbaccel.data.order import epoch_order, samples_at
from lbaccel.randomness.keys import keyed_hash, keyed_uniform


def test_small_keys_do_not_collide():
    a, b, c = np.meshgrid(np.arange(50), np.arange(50), np.arange(50))
    assert len(np.unique(keyed_hash(a, b, c))) == 50**3


def bits(values):
    return np.unpackbits(values.view(np.uint8)).reshape(len(values), 64).sum(1)


def test_one_bit_of_a_key_turns_half_the_bits():
    keys = np.arange(2000)
    base = keyed_hash(7, keys)
    for bit in (0, 5, 31, 62):
        turned = bits(base ^ keyed_hash(7, keys ^ (1 << bit)))
        assert abs(turned.mean() - 32) < 4 * 4 / 2000**0.5  # a bit's variance is 64 / 4 = 4^2


def test_the_order_of_the_parts_counts():
    assert keyed_hash(1, 2) != keyed_hash(2, 1)


def test_uniform_numbers_are_uniform_and_independent_of_each_other():
    u = keyed_uniform(3, np.arange(20000), 1)
    v = keyed_uniform(3, np.arange(20000), 2)
    assert ((u >= 0) & (u < 1)).all()
    assert stats.kstest(u, "uniform").pvalue > 0.001
    for other in (v, np.roll(u, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 4 / 20000**0.5


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(0, e, 1000) for e in range(3)] + [epoch_order(1, 0, 1000)]
    for order in orders:
        assert (np.sort(order) == np.arange(1000)).all()
    for i in range(4):
        for j in range(i):
            assert np.mean(orders[i] == orders[j]) < 0.01
    assert (epoch_order(0, 1, 1000) == orders[1]).all()


def test_each_place_of_the_order_is_uniform_over_the_samples():
    first = [epoch_order(0, e, 10)[0] for e in range(3000)]
    assert stats.chisquare(np.bincount(first, minlength=10)).pvalue > 0.001


def test_a_stretch_of_the_stream_runs_over_the_epochs_end():
    indices, epochs = samples_at(7, 6, num_samples=10, seed=4)
    truth = [*epoch_order(4, 0, 10)[7:], *epoch_order(4, 1, 10)[:3]]
    assert indices.tolist() == truth and epochs.tolist() == [0, 0, 0, 1, 1, 1]
