"""The smallest limit of the CUDA allocator: closed cases, random updates, and a published fact."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.cuda_allocator import CachingAllocator, OutOfMemory, replay
from lbaccel.planning.cost.cuda_limit import SETTLED, STEP, UPDATES, smallest_limit
from lbaccel.planning.cost.devices import GIB, find_device
from lbaccel.planning.cost.trace import Allocate, Free, Mark, Trace
from lbaccel.planning.cost.trace_parts import requests
from lbaccel.planning.cost.update import classification_loss
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.network import Trained, network_of

MIB = 2**20


@st.composite
def updates(draw):
    """Requests of an update, most of them freed in some order."""
    sizes = draw(st.lists(st.integers(1, 64 * MIB), min_size=1, max_size=30))
    requests, live = [], []
    for name, size in enumerate(sizes):
        requests.append((name, size))
        live.append(name)
        while live and draw(st.booleans()):
            requests.append((live.pop(draw(st.integers(0, len(live) - 1))), -1))
    return requests


def after_updates(held, update, limit=None):
    """The allocator itself, and how often each update emptied its cache; raises OutOfMemory."""
    allocator, found = CachingAllocator(capacity=limit), []
    for _, size in held:
        allocator.malloc(size)
    for _ in range(UPDATES):
        before, handles = allocator.num_retries, {}
        for name, size in update:
            if size == -1:
                allocator.free(handles.pop(name))
            else:
                handles[name] = allocator.malloc(size)
        for handle in handles.values():
            allocator.free(handle)
        found.append(allocator.num_retries - before)
    return allocator, found


def retries_of_updates(held, update, limit):
    return after_updates(held, update, limit)[1]


def reserved_by_updates(held, update):
    return after_updates(held, update)[0].peak_reserved


def settles(held, update, limit):
    try:
        return not any(retries_of_updates(held, update, limit)[-SETTLED:])
    except OutOfMemory:
        return False


@settings(deadline=None, max_examples=100)
@given(updates(), st.lists(st.integers(1, 20 * MIB), max_size=5))
def test_updates_settle_at_the_limit_which_lies_between_use_and_reserve(update, sizes):
    held = [(-1 - i, size) for i, size in enumerate(sizes)]
    limit = smallest_limit(held, update)
    free = replay([*held, *update])
    assert free.peak_allocated <= limit <= reserved_by_updates(held, update)
    assert settles(held, update, limit)


@settings(deadline=None, max_examples=100)
@given(updates(), st.lists(st.integers(1, 20 * MIB), max_size=5))
def test_under_the_limit_one_step_lower_updates_do_not_settle(update, sizes):
    held = [(-1 - i, size) for i, size in enumerate(sizes)]
    limit, free = smallest_limit(held, update), replay([*held, *update])
    in_use, reserved = free.peak_allocated, reserved_by_updates(held, update)
    tried = [int(in_use * (1 + STEP * i)) for i in range(500)]
    below = max((t for t in tried if t < limit), default=None)
    assert limit == reserved or limit in tried
    assert (below is None) == (limit == in_use)
    if below is not None:
        assert not settles(held, update, below)


def test_a_kept_segment_that_fits_nothing_is_not_counted():
    update = [(1, 30 * MIB), (1, -1), (2, 40 * MIB), (3, 20 * MIB)]
    assert replay(update).peak_reserved == 70 * MIB
    assert smallest_limit([], update) == 60 * MIB


def test_where_blocks_in_use_pin_their_segments_all_that_is_reserved_is_needed():
    update = [(1, 40 * MIB), (1, -1), (2, 30 * MIB), (3, 30 * MIB)]
    free = replay(update)
    assert (free.peak_allocated, free.peak_reserved) == (60 * MIB, 70 * MIB)
    assert smallest_limit([], update) == 70 * MIB
    with pytest.raises(OutOfMemory):
        retries_of_updates([], update, 69 * MIB)


def test_what_a_second_update_reserves_more_is_counted():
    # 3 lie in a segment of 20, and so do the first 12; the next 3 lie in the segment of 12, as the
    # smallest with room, and what is left of both segments holds no 12
    update = [(1, 3 * MIB), (2, 12 * MIB), (3, 12 * MIB)]
    assert replay(update).peak_reserved == 32 * MIB
    with pytest.raises(OutOfMemory):
        retries_of_updates([], update, 32 * MIB)
    assert smallest_limit([], update) == 44 * MIB
    assert retries_of_updates([], update, 44 * MIB) == [0] * UPDATES


def test_a_limit_of_whole_steps_is_not_rounded_below_what_is_reserved():
    update = [(10, 7 * MIB), (11, 37 * MIB), (12, 5 * MIB)]
    limit = smallest_limit([], update)
    assert limit == reserved_by_updates([], update) and settles([], update, limit)


def test_a_limit_at_which_updates_go_on_emptying_the_cache_is_not_enough():
    sizes = (56, 58, None, 66, 66, 12, None, None, 74, None)
    frees = iter((0, 1, 2, 5))
    takes = iter(range(6))
    update = [(next(frees), -1) if n is None else (next(takes), n * MIB) for n in sizes]
    assert replay(update).peak_allocated == 202 * MIB
    assert retries_of_updates([], update, 222 * MIB) == [2, 0, 1, 1, 1]
    limit = smallest_limit([], update)
    assert limit > 222 * MIB and not any(retries_of_updates([], update, limit)[-SETTLED:])


def test_weights_stay_though_the_trace_ends_with_their_end():
    trace = Trace(
        [
            Allocate(0, 8), Mark("micro-step 0"), Allocate(1, 4), Mark("micro-step 1"), Free(1),
            Free(0),
        ]
    )  # fmt: skip
    assert requests(trace) == ([(0, 8)], [(1, 4), (1, -1)])


@pytest.mark.parametrize(
    ("name", "batch", "ran"), [("resnet50", 512, True), ("seresnet50", 512, False)]
)
def test_what_timm_trained_on_a_card_fits_and_what_it_could_not_does_not(name, batch, ran):
    """timm's results of training under AMP on an RTX 3090 (benchmarks/published_batches.py)."""
    card = find_device("RTX 3090")
    trained = Trained(
        model=name, img_size=224, num_classes=1000, optimizer="momentum", make_batch=None,
        loss_fn=classification_loss, clips=False, precision="fp16",
    )  # fmt: skip
    plan = BatchPlan(
        global_batch_size=batch, micro_batch_size=batch, world_size=1, norm_batch_size=batch
    )
    estimator = Estimator(network_of(trained, card), plan, card, "fp16")
    peak = estimator.estimate(Candidate(batch, "channels_last")).peak
    assert (peak <= card.memory) == ran, peak / GIB
