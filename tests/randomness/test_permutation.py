"""The network permutes, as its equation says, and nothing is seen that a random order lacks."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from lbaccel.randomness import permutation
from lbaccel.randomness.permutation import ROUNDS, keyed_permutation

MASK = 2**64 - 1
ODD = 4099  # of 65 x 64 pairs: a prime, so that some places walk
EPOCHS = 200


def slow_hash(*parts):
    """SplitMix64 chained over the parts, in Python's own whole numbers."""
    h = 0
    for part in parts:
        h = ((h + part + 1) * 0x9E3779B97F4A7C15) & MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
        h ^= h >> 31
    return h


def slow(place, size, *key):
    """One value, a line an equation."""
    a = math.ceil(math.sqrt(size))
    b = math.ceil(size / a)
    while True:
        left, right = place // b, place % b
        for j in range(8):
            if j % 2 == 0:
                left = (left + slow_hash(*key, j, right) % a) % a
            else:
                right = (right + slow_hash(*key, j, left) % b) % b
        place = left * b + right
        if place < size:
            return place


@pytest.mark.parametrize("size", [1, 2, 3, 10, 30, ODD, 2**20 + 7, 14_000_000, 2**45 + 1])
def test_the_values_are_those_of_the_equation(size):
    places = [n * (size - 1) // 40 for n in range(41)]
    for key in ((0, 3), (2**64 - 1, 7, 5)):
        truth = [slow(place, size, *key) for place in places]
        assert keyed_permutation(places, size, *key).tolist() == truth


def test_each_value_comes_once_at_every_size():
    for size in range(1, 2100):
        found = keyed_permutation(np.arange(size), size, 4, size % 5)
        assert np.array_equal(np.sort(found), np.arange(size)), size


@pytest.mark.parametrize("size", [1000**2, 1000**2 + 1, 2**20 + 1, 1_299_709])
def test_each_value_comes_once_in_a_large_set_too(size):
    seen = np.zeros(size, bool)
    seen[keyed_permutation(np.arange(size), size, 1, 2)] = True
    assert seen.all()


def test_the_shape_is_that_of_the_places_and_they_stay():
    places = np.arange(6).reshape(2, 3)
    found = keyed_permutation(places, 7, 0)
    assert found.shape == (2, 3) and found.dtype == np.int64
    assert keyed_permutation(4, 7, 0) == found[1, 1]
    assert keyed_permutation([], 7, 0).shape == (0,)
    assert places.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_memory_depends_on_the_places_and_not_on_the_size():
    places = np.arange(256)
    keyed_permutation(places, 2**40, 0)
    tracemalloc.start()
    keyed_permutation(places, 2**40, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


# -- as random as a random order ------------------------------------------------------------------


def orders(rounds, monkeypatch):
    monkeypatch.setattr(permutation, "ROUNDS", rounds)
    return [keyed_permutation(np.arange(ODD), ODD, 5, epoch) for epoch in range(EPOCHS)]


def uniform(values, size=ODD, bins=64):
    """p of the hypothesis that each of 0 ... size - 1 is as frequent as any other."""
    edges = np.arange(bins + 1) * size // bins
    counts = np.histogram(values, edges)[0]
    return stats.chisquare(counts, np.diff(edges) * (counts.sum() / size)).pvalue


def p_values(found):
    """Name of a hypothesis that holds for random orders, to its p."""
    columns = math.ceil(ODD / math.ceil(math.sqrt(ODD)))  # b
    steps = [np.concatenate([(p[d:] - p[:-d]) % ODD for p in found]) for d in (1, columns)]
    cross = [p[: -columns - 1] - p[1:-columns] - p[columns:-1] + p[columns + 1 :] for p in found]
    same = np.array([(p == q).sum() for p, q in zip(found[1:], found, strict=False)])
    expected = [*stats.poisson.pmf(range(4), 1), stats.poisson.sf(3, 1)]
    pairs = [np.histogram2d(p[1:], p[:-1], 16, [[0, ODD]] * 2)[0] for p in found]
    return {
        "index, place 1000": uniform([p[1000] for p in found], bins=8),
        "place of index 1000": uniform([int(np.argmax(p == 1000)) for p in found], bins=8),
        "step between neighbours": uniform(steps[0][steps[0] > 0] - 1, ODD - 1),
        "step to the same r": uniform(steps[1][steps[1] > 0] - 1, ODD - 1),
        "step of steps": uniform(np.concatenate(cross) % ODD),
        "index and the next one": stats.chisquare(sum(pairs).ravel()).pvalue,
        "step from epoch to epoch": uniform(np.subtract(found[1:], found[:-1]).ravel() % ODD),
        "equal places of two epochs": stats.chisquare(
            np.bincount(np.minimum(same, 4), minlength=5), np.array(expected) * len(same)
        ).pvalue,
        "columns": columns_alike(found),
    }


def columns_alike(found):
    """p of: two places of one r whose indices' l differ by as much are as frequent as by chance.

    A network of few rounds lets such pairs through (they meet in a round's hash).
    """
    a = math.ceil(math.sqrt(ODD))
    b = math.ceil(ODD / a)
    count = chance = 0
    for order in found:
        rows = (order // b)[: ODD // b * b].reshape(-1, b)
        for apart in range(1, len(rows)):
            differ = (rows[apart:] - rows[:-apart]) % a
            count += (differ == apart % a).sum()
            chance += differ.size / a
    return 2 * stats.norm.sf(abs(count - chance) / math.sqrt(chance))


def test_epochs_look_random(monkeypatch):
    for name, p in p_values(orders(ROUNDS, monkeypatch)).items():
        assert p > 0.001, (name, p)


@pytest.mark.parametrize(
    ("rounds", "seen"),
    [(2, "index and the next one"), (4, "step to the same r"), (6, "columns")],
)
def test_the_look_above_tells_fewer_rounds_from_random(rounds, seen, monkeypatch):
    """So the number of rounds is not chosen by the proof, but by what is seen."""
    assert p_values(orders(rounds, monkeypatch))[seen] < 1e-6


def test_seeds_and_epochs_give_other_orders():
    size = 14_000_000
    places = np.arange(20_000)
    keys = [(0, 1, 0), (0, 1, 1), (1, 1, 0), (0, 2, 0), (1, 0, 0)]
    found = [keyed_permutation(places, size, *key) for key in keys]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert (one == other).sum() < 4  # by chance 20,000 / N
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / len(places) ** 0.5


def test_a_tiny_set_needs_the_sort(monkeypatch):
    """Of 3 x 3 pairs the network gives even permutations alone, however many rounds it has."""
    monkeypatch.setattr(permutation, "ROUNDS", 40)
    for seed in range(300):
        order = keyed_permutation(np.arange(9), 9, seed)
        inversions = sum(order[i] > order[j] for i in range(9) for j in range(i, 9))
        assert inversions % 2 == 0
