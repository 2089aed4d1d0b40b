from __future__ import annotations

import tracemalloc
from contextlib import closing

import numpy as np
import pytest
import torch
from scipy import stats

from lbaccel import BatchPlan, InputError, UpdateLoader
from lbaccel.data import order as rules
from lbaccel.data.order import COMPUTED, MOST_SORTED, SORTED, epoch_order, repeated_at, samples_at
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


# -- two rules of order ---------------------------------------------------------------------------


def sorted_order(seed, epoch, count):
    """The first rule: what every lbaccel before the second one computed."""
    return np.argsort(keyed_hash(seed, 0x0DE5, epoch, np.arange(count)), kind="stable")


@pytest.mark.parametrize("count", [1, 2, 7, 1000, MOST_SORTED])
def test_up_to_the_bound_the_second_rule_is_the_first(count):
    truth = sorted_order(3, 2, count)
    for rule in (SORTED, COMPUTED):
        assert np.array_equal(epoch_order(3, 2, count, order=rule), truth)


def test_above_the_bound_the_first_rule_stays_and_the_second_permutes():
    count = MOST_SORTED + 1
    old, new = (epoch_order(3, 2, count, order=rule) for rule in (SORTED, COMPUTED))
    assert np.array_equal(old, sorted_order(3, 2, count))
    assert np.array_equal(np.sort(new), np.arange(count))
    assert (old == new).sum() < 10  # by chance one
    assert np.array_equal(new, epoch_order(3, 2, count))


def test_a_large_set_is_begun_anywhere_without_its_order_in_memory():
    count = 14_000_000
    start = 5 * count - 100  # a resume, over the end of an epoch
    tracemalloc.start()
    indices, epochs = samples_at(start, 256, num_samples=count, seed=1)
    copies, _ = repeated_at((0, 256), 0, 256, num_samples=count, seed=1, repeats=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert epochs.tolist() == [4] * 100 + [5] * 156
    for end in (100, 256):
        assert len(set(indices[:end][-100:].tolist())) == 100
    assert indices.min() >= 0 and count * 0.95 < indices.max() < count
    firsts = samples_at(0, 128, num_samples=count, seed=1)[0]
    assert copies.tolist() == [*firsts, *firsts]


@pytest.fixture
def low_bound(monkeypatch):
    """Sets of more than ten samples are large ones."""
    monkeypatch.setattr(rules, "MOST_SORTED", 10)


def read(loader, num_updates):
    """The indices of that many updates."""
    found = []
    with closing(loader):  # a worker that the collector ends may end inside another one
        while len(found) < num_updates:
            for update in loader:
                found.append(torch.cat([data for _, data in update]).tolist())
                if len(found) == num_updates:
                    break
    return found


def loader_of(**options):
    plan = BatchPlan(global_batch_size=6, micro_batch_size=2)
    return UpdateLoader(list(range(24)), plan, seed=5, **options)


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"num_workers": 1}])
def test_a_state_of_before_keeps_the_first_rule_and_a_new_one_the_second(options, low_bound):
    stream = [i for epoch in range(3) for i in sorted_order(5, epoch, 24)]
    new = read(loader_of(**options), 12)
    if "repeats" not in options:
        assert new[:4] != new[4:8] != new[8:]  # three epochs
    of_before = loader_of(**options)
    of_before.load_state_dict({"next_update": 0, "growth": []})
    old = read(of_before, 12)
    if "repeats" not in options:
        assert old == np.array(stream[:72]).reshape(12, 6).tolist()
    assert sum(a == b for a, b in zip(old, new, strict=True)) < 3
    for truth, state in (
        (old, {"next_update": 5, "growth": []}),  # as it was written then
        (old, {"next_update": 5, "growth": [], "order": SORTED}),  # and written again since
        (new, {"next_update": 5, "growth": [], "order": COMPUTED}),
    ):
        late = loader_of(**options)
        late.load_state_dict(state)
        assert late.state_dict() == {"order": SORTED, **state}
        assert read(late, 7) == truth[5:]


def test_a_new_loader_says_the_second_rule():
    assert loader_of().state_dict()["order"] == COMPUTED


@pytest.mark.parametrize("order", [3, 0, "sorted", True, None])
def test_a_rule_of_a_later_lbaccel_is_refused_and_changes_nothing(order):
    loader = loader_of()
    with pytest.raises(InputError, match="is of a later lbaccel"):
        loader.load_state_dict({"next_update": 5, "order": order})
    assert loader.state_dict() == {"next_update": 0, "growth": [], "order": COMPUTED}
