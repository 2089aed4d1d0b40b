"""The schedule of least work for given bytes, beside a search of all schedules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lbaccel.errors import InputError
from lbaccel.update.global_norm.schedule import Chain, best_schedule, bytes_needed


def random_chain(seed, depth):
    rng = np.random.default_rng(seed)
    lives = {(-1, 0): 40, (-1, depth): 3}
    for born in range(depth):
        lives[born, born + 1] = int(rng.integers(5, 100))
        if rng.random() < 0.5:
            lives[born, int(rng.integers(born + 1, depth + 1))] = int(rng.integers(5, 60))
    gradients = tuple(int(g) for g in rng.integers(1, 60, depth + 1))
    return Chain(lives, gradients, tuple(rng.integers(1, 20, depth + 1).astype(float)), one=7)


def frontier(chain, level):
    return {life for life in chain.lives if life[0] < level <= life[1]}


def by_hand(chain, kept, stored):
    """(bytes, work) of a schedule, by running it: which values lie there at each pass."""
    size, depth = chain.lives, chain.depth

    def total(values):
        return sum(size[v] for v in values)

    most, work = total(frontier(chain, 0)), 0.0
    for level in range(depth):  # forward
        below = set().union(*(frontier(chain, k) for k in kept if k <= level))
        most = max(most, total(below | frontier(chain, level + 1)))
    for level in range(depth, -1, -1):
        start = max(k for k in kept if k <= level)
        gap = kept.index(start)
        there = set().union(*(frontier(chain, k) for k in kept if k <= level))
        if level > start:
            last = level + 1 == kept[gap + 1]
            if stored[gap]:
                there |= set().union(*(frontier(chain, k) for k in range(start + 1, level + 1)))
                work += sum(chain.work[start:level]) if last else 0.0
            else:
                work += sum(chain.work[start:level])
        above = chain.gradients[level + 1] if level < depth else 0
        most = max(most, total(there) + max(chain.gradients[level], above))
    return most + chain.one, work


def every_schedule(depth):
    for count in range(depth):
        for inner in itertools.combinations(range(1, depth), count):
            kept = (0, *inner, depth)
            ways = [(True,) if b == a + 1 else (True, False) for a, b in itertools.pairwise(kept)]
            yield from ((kept, how) for how in itertools.product(*ways))


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_of_the_bytes_works_less(seed):
    chain = random_chain(seed, depth=5)
    costs = {key: by_hand(chain, *key) for key in every_schedule(5)}
    most = best_schedule(chain, None).host_bytes
    least = min(num_bytes for num_bytes, _ in costs.values())
    refused = 0
    for budget in np.linspace(0.8 * least, 1.05 * most, 23).astype(int):
        fitting = [work for num_bytes, work in costs.values() if num_bytes <= budget]
        try:
            found = best_schedule(chain, int(budget))
        except InputError:
            refused += 1
            assert not any(
                bytes_needed(chain, *key) <= budget for key in costs
            )  # the equations' own verdict
            continue
        assert found.host_bytes <= budget
        num_bytes, work = costs[found.kept, found.stored]
        assert num_bytes <= found.host_bytes
        assert work == pytest.approx(found.work * sum(chain.work))
        least_work = min(
            work for key, (_, work) in costs.items() if bytes_needed(chain, *key) <= budget
        )
        assert work == pytest.approx(least_work) and fitting
    assert refused


def test_the_bytes_are_those_of_the_passes_to_a_gradients_share():
    """The equations take the largest gradient of a gap, a pass that of its own level."""
    for seed in range(6):
        chain = random_chain(seed, depth=5)
        for key in every_schedule(5):
            counted, run = bytes_needed(chain, *key), by_hand(chain, *key)[0]
            assert run <= counted <= run + max(chain.gradients)


def test_too_little_names_the_least():
    chain = random_chain(0, depth=5)
    with pytest.raises(InputError, match=r"keeps at least .* GiB .* are given"):
        best_schedule(chain, 10)
