"""The simulated allocator against the rules by hand, a slow model, and a CUDA device."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbaccel.planning.cost.cuda_allocator import CachingAllocator, OutOfMemory, replay

KIB, MIB = 2**10, 2**20


def state(allocator):
    return (
        allocator.allocated,
        allocator.reserved,
        allocator.peak_allocated,
        allocator.peak_reserved,
        allocator.num_retries,
    )


def after(*sizes, **options):
    """An allocator after requests of these sizes, and their handles."""
    allocator = CachingAllocator(**options)
    return allocator, [allocator.malloc(size) for size in sizes]


def up(value, multiple):
    return (value + multiple - 1) // multiple * multiple


class SlowModel:
    """The same rules over address intervals, found anew by linear scans: no links, no merging.

    A pool is a set of mapped intervals (segments, or pages that are joined when they touch) and
    the intervals in use; what is free are the gaps.
    """

    def __init__(self, *, capacity=None, expandable_segments=False):
        self.capacity, self.expandable = capacity, expandable_segments
        self.segments = {"small": [], "large": []}
        self.used = {"small": {}, "large": {}}
        self.end = {"small": 0, "large": 0}
        self.page = {"small": 2 * MIB, "large": 20 * MIB}
        self.peak_allocated = self.peak_reserved = self.num_retries = 0
        self.count = 0
        self.where = {}

    @property
    def allocated(self):
        return sum(b - a for used in self.used.values() for a, b in used.values())

    @property
    def reserved(self):
        return sum(b - a for segments in self.segments.values() for a, b in segments)

    def gaps(self, pool, start, end):
        """Intervals of [start, end) that are not in use."""
        gaps, at = [], start
        for a, b in sorted(self.used[pool].values()):
            if start <= a < end:
                gaps.append((at, a))
                at = b
        return [(a, b) for a, b in [*gaps, (at, end)] if a < b]

    def joined(self, pool):
        """Segments in order; pages that touch are one."""
        joined = []
        for a, b in sorted(self.segments[pool]):
            if self.expandable and joined and joined[-1][1] == a:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        return joined

    def free_runs(self, pool):
        return [gap for a, b in self.joined(pool) for gap in self.gaps(pool, a, b)]

    def reach(self, pool, run):
        """The size of a run with the unmapped space behind it."""
        a, b = run
        if not self.expandable or any(start == b for start, _ in self.used[pool].values()):
            return b - a
        following = [start for start, _ in self.joined(pool) if start >= b]
        return min(following, default=10**18) - a

    def best_fit(self, pool, size):
        runs = sorted((b - a, a, b) for a, b in self.free_runs(pool) if b - a >= size)
        if not runs:
            return None
        best = runs[0][1:]
        for _, a, b in runs[1:]:
            if self.reach(pool, (a, b)) >= self.reach(pool, best):
                break
            best = (a, b)
        return best

    def reserve(self, pool, a, b):
        if self.capacity is not None and self.reserved + b - a > self.capacity:
            return False
        self.segments[pool].append((a, b))
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def grow(self, pool, size):
        if not self.expandable:
            start = self.end[pool]
            end = start + (self.page[pool] if size < 10 * MIB else up(size, 2 * MIB))
            if not self.reserve(pool, start, end):
                return None
            self.end[pool] = end
            return start, end
        page, mapped = self.page[pool], {a for a, _ in self.segments[pool]}
        for a, b in self.gaps(pool, 0, 10**15):
            wanted = range(a // page * page, a + size, page)
            # a free run that starts within a page has that page mapped
            if b - a >= size and any(
                p not in mapped for p in range(up(a, page), min(b, 10**12), page)
            ):
                chunks, previous = [], None
                for p in (p for p in wanted if p not in mapped):
                    if previous is None or p != previous + page:
                        chunks.append([])
                    chunks[-1].append(p)
                    previous = p
                for chunk in chunks:
                    # a driver that cannot map all pages of one call maps none of them
                    room = self.capacity is None or (
                        self.reserved + page * len(chunk) <= self.capacity
                    )
                    if not room:
                        return None
                    assert all(self.reserve(pool, p, p + page) for p in chunk)
                return next((x, y) for x, y in self.free_runs(pool) if x == a)
        raise AssertionError

    def release(self):
        for pool, segments in self.segments.items():
            self.segments[pool] = [
                (a, b)
                for a, b in segments
                if any(x < b and a < y for x, y in self.used[pool].values())
            ]

    def malloc(self, num_bytes):
        self.count += 1
        if num_bytes:
            size = up(num_bytes, 512)
            pool = "small" if size <= MIB else "large"
            run = self.best_fit(pool, size) or self.grow(pool, size)
            if run is None:
                self.num_retries += 1
                self.release()
                run = self.grow(pool, size)
            if run is None:
                self.count -= 1
                raise OutOfMemory
            a, b = run
            splits = b - a - size >= (512 if pool == "small" or self.expandable else MIB + 512)
            self.used[pool][self.count] = (a, a + size if splits else b)
            self.where[self.count] = pool
            self.peak_allocated = max(self.peak_allocated, self.allocated)
        return self.count

    def free(self, handle):
        if handle in self.where:
            del self.used[self.where.pop(handle)][handle]

    def depends_on_addresses(self, num_bytes):
        """Whether blocks of one size could serve a request and are not whole segments alike."""
        size = up(num_bytes, 512)
        pool = "small" if size <= MIB else "large"
        best = self.best_fit(pool, size)
        if best is None or self.expandable:
            return False
        alike = [r for r in self.free_runs(pool) if r[1] - r[0] == best[1] - best[0]]
        return len(alike) > 1 and not all(run in self.segments[pool] for run in alike)


# ---- the rules by hand ----


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest small request
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounded up before the segment is chosen
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # 2 MiB - 512 remain: split
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB + 512 remain: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB remains: not split, the whole block counts
        (12 * MIB, 12 * MIB, 12 * MIB),
    ],
)
def test_a_first_request_takes_the_segment_of_its_size(num_bytes, allocated, reserved):
    allocator, _ = after(num_bytes)
    assert state(allocator) == (allocated, reserved, allocated, reserved, 0)


@pytest.mark.parametrize("expandable", [False, True])
def test_zero_bytes_cost_nothing_and_have_a_handle(expandable):
    allocator, handles = after(0, 0, expandable_segments=expandable)
    assert len(set(handles)) == 2
    for handle in handles:
        allocator.free(handle)
    assert state(allocator) == (0, 0, 0, 0, 0)


def test_a_small_block_is_split_down_to_512_bytes():
    # 1 MiB + (1 MiB - 512) leave exactly 512 of the 2 MiB; the third request takes them
    allocator, _ = after(MIB, MIB - 512, 512)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.malloc(1)
    assert allocator.reserved == 4 * MIB


def test_the_smallest_block_that_fits_is_taken():
    # 20 MiB segment: 8, 2, 4, 2 in use, 4 left. Of the free 8 and 4 a request of 3 takes a 4, so
    # that 8 still fits. The 4 would leave 1 MiB, not more: it is taken whole.
    allocator, (eight, _, four, _) = after(8 * MIB, 2 * MIB, 4 * MIB, 2 * MIB)
    allocator.free(eight)
    allocator.free(four)
    allocator.malloc(3 * MIB)
    assert allocator.allocated == (2 + 2 + 4) * MIB
    allocator.malloc(8 * MIB)
    assert allocator.reserved == 20 * MIB


def test_of_equal_blocks_the_lowest_is_taken():
    # four of 512 KiB fill a segment; the third and then the first go. The request takes the first,
    # so that the fourth, when it goes, joins the third and 1 MiB fits.
    allocator, handles = after(*[512 * KIB] * 4)
    allocator.free(handles[2])
    allocator.free(handles[0])
    allocator.malloc(512 * KIB)
    allocator.free(handles[3])
    allocator.malloc(MIB)
    assert allocator.reserved == 2 * MIB


def test_freed_neighbours_merge_and_others_do_not():
    # 20 MiB segment of four times 5 MiB: the first and third do not join, and 6 MiB need another
    # segment; with the second they make 15 MiB, and with the fourth the whole segment.
    allocator, (a, b, c, d) = after(*[5 * MIB] * 4)
    allocator.free(a)
    allocator.free(c)
    six = allocator.malloc(6 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.free(b)
    allocator.malloc(15 * MIB)
    assert allocator.reserved == 40 * MIB
    assert allocator.allocated == (5 + 6 + 15) * MIB
    allocator.free(six)
    allocator.free(d)
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_blocks_of_two_segments_never_merge():
    # two segments of 10 MiB, both free: 12 MiB fit into neither
    allocator, handles = after(10 * MIB, 10 * MIB)
    for handle in handles:
        allocator.free(handle)
    allocator.malloc(12 * MIB)
    assert allocator.reserved == 32 * MIB


def test_a_free_keeps_the_segment_and_the_peaks():
    allocator, (handle,) = after(30 * MIB)
    allocator.free(handle)
    assert state(allocator) == (0, 30 * MIB, 30 * MIB, 30 * MIB, 0)
    allocator.malloc(1)  # from the small pool, whatever the large one has free
    assert state(allocator) == (512, 32 * MIB, 30 * MIB, 32 * MIB, 0)


def test_wholly_free_segments_of_both_pools_make_room_once():
    # 12 + 2 MiB cached, 20 asked of 30: only after the release, which takes both
    allocator, handles = after(12 * MIB, 1, capacity=30 * MIB)
    for handle in handles:
        allocator.free(handle)
    allocator.malloc(20 * MIB)
    assert state(allocator) == (20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB, 1)
    allocator.malloc(10 * MIB)  # exactly the capacity needs no release
    assert state(allocator) == (30 * MIB, 30 * MIB, 30 * MIB, 30 * MIB, 1)


def test_a_segment_in_part_use_is_not_released_and_the_request_fails():
    # 20 MiB with 2 in use stay, 14 MiB go; 18 MiB + 512 need 20 more: 40 > 34
    allocator, (_, five, other) = after(2 * MIB, 5 * MIB, 14 * MIB, capacity=34 * MIB)
    allocator.free(five)
    allocator.free(other)
    with pytest.raises(OutOfMemory, match=f"capacity={34 * MIB}: {20 * MIB} bytes are reserved"):
        allocator.malloc(18 * MIB + 1)
    # the peaks are from before: 2 + 5 + 14 in use of 20 + 14
    assert state(allocator) == (2 * MIB, 20 * MIB, 21 * MIB, 34 * MIB, 1)
    allocator.malloc(18 * MIB)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)


def test_an_expandable_segment_grows_by_pages_and_serves_what_was_joined():
    # 12 + 12 MiB need two pages of 20; freed they are one run of 40, which serves 40 MiB.
    # Segments of their own (12 + 12) would have to grow by 40.
    for expandable, pages, reserved in [(True, 40 * MIB, 40 * MIB), (False, 24 * MIB, 64 * MIB)]:
        allocator, handles = after(12 * MIB, 12 * MIB, expandable_segments=expandable)
        assert (allocator.allocated, allocator.reserved) == (24 * MIB, pages)
        for handle in handles:
            allocator.free(handle)
        allocator.malloc(40 * MIB)
        assert (allocator.allocated, allocator.reserved) == (40 * MIB, reserved)


def test_an_expandable_segment_always_splits():
    # of the page of 20 MiB 512 bytes remain and are not counted
    allocator, _ = after(20 * MIB - 512, expandable_segments=True)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB - 512, 20 * MIB)


def test_an_expandable_segment_gives_back_whole_pages_and_fills_the_hole():
    # four pages of 20 MiB: [0, 70) and [70, 75) in use
    allocator, (first, _) = after(70 * MIB, 5 * MIB, expandable_segments=True, capacity=80 * MIB)
    assert allocator.reserved == 80 * MIB
    # the small pool's page of 2 MiB has no room until [0, 60) goes back
    allocator.free(first)
    allocator.malloc(MIB)
    assert (allocator.reserved, allocator.num_retries) == (22 * MIB, 1)
    # 40 MiB map two pages of the hole again; 10 MiB find [60, 70), which stayed
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 62 * MIB
    allocator.malloc(10 * MIB)
    assert (allocator.allocated, allocator.reserved) == (56 * MIB, 62 * MIB)


def test_of_a_hole_behind_a_free_block_only_the_pages_needed_are_mapped():
    # four pages of 20 MiB: 5, 70 and 5 in use. Of the 70 the pages [20, 60) go back; 25 MiB from
    # 5 on need [20, 40) of them: 62 of 80 MiB, where the whole hole would make 82.
    allocator, (_, middle, _) = after(
        5 * MIB, 70 * MIB, 5 * MIB, expandable_segments=True, capacity=80 * MIB
    )
    allocator.free(middle)
    allocator.malloc(MIB)
    assert allocator.reserved == 42 * MIB
    allocator.malloc(25 * MIB)
    assert (allocator.allocated, allocator.reserved) == (36 * MIB, 62 * MIB)
    assert allocator.num_retries == 1


# ---- events ----


def test_a_replay_is_the_calls_one_by_one():
    # 3 MiB in a segment of 20, freed; 4 MiB reuse it under the same id
    allocator = replay([(5, 3 * MIB), (9, 0), (5, -1), (5, 4 * MIB), (9, -1)])
    assert state(allocator) == (4 * MIB, 20 * MIB, 4 * MIB, 20 * MIB, 0)


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([(1, 5), (1, 5)], "1 is already in use"),
        ([(1, -1)], "1 is not in use"),
        ([(1, 0), (1, -1), (1, -1)], "1 is not in use"),
        ([(1, -2)], "num_bytes=-2 is negative"),
    ],
)
def test_a_replay_stops_at_events_that_cannot_be(events, error):
    with pytest.raises(ValueError, match=error):
        replay(events)


def test_a_handle_is_freed_once():
    allocator, (handle,) = after(1)
    allocator.free(handle)
    with pytest.raises(ValueError, match=f"handle={handle} is not in use"):
        allocator.free(handle)


def test_a_replay_passes_its_options_on():
    with pytest.raises(OutOfMemory):
        replay([(1, 21 * MIB)], capacity=21 * MIB)
    assert replay([(1, 21 * MIB)], expandable_segments=True).reserved == 40 * MIB


# ---- against the slow model ----

EDGES = [0, 1, 512, 513, MIB, MIB + 1, 5 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 20 * MIB]
SIZES = st.one_of(
    st.sampled_from(EDGES),
    st.integers(1, MIB),
    st.integers(MIB, 24 * MIB),
    st.integers(1, 24).map(lambda n: n * MIB),
)
# a request, or a free of the n-th of what is in use
ACTIONS = st.lists(
    st.one_of(SIZES.map(lambda n: ("malloc", n)), st.integers(0, 99).map(lambda n: ("free", n))),
    max_size=60,
)


def random_actions(seed, number):
    rng = random.Random(seed)
    for _ in range(number):
        if rng.random() < 0.45:
            yield "free", rng.randrange(100)
        else:
            top = rng.choice([4 * KIB, 256 * KIB, MIB, 4 * MIB, 30 * MIB])
            yield "malloc", rng.randrange(top + 1)


def both_agree(actions, **options):
    fast, slow, live = CachingAllocator(**options), SlowModel(**options), []
    for action, n in actions:
        if action == "free" and live:
            handle = live.pop(n % len(live))
            fast.free(handle)
            slow.free(handle)
        elif action == "malloc":
            try:
                expected = slow.malloc(n)
            except OutOfMemory:
                with pytest.raises(OutOfMemory):
                    fast.malloc(n)
            else:
                assert fast.malloc(n) == expected
                live.append(expected)
        assert state(fast) == state(slow)
        assert fast.allocated <= fast.reserved
        # the same intervals as the slow model's, which tile the gaps: no two overlap
        blocks = {h: b for h, b in fast._blocks.items() if b is not None}
        assert {h: (b.address, b.address + b.size) for h, b in blocks.items()} == {
            **slow.used["small"],
            **slow.used["large"],
        }
        for used in slow.used.values():
            ends = sorted(used.values())
            assert all(x[1] <= y[0] for x, y in pairwise(ends))
    for handle in live:
        fast.free(handle)
        slow.free(handle)
    for name, pool in (("small", fast._small), ("large", fast._large)):
        # merged: what is free are the segments themselves
        assert sorted((b.address, b.address + b.size) for *_, b in pool.free) == slow.joined(name)
    assert state(fast) == state(slow)
    assert fast.allocated == 0


@settings(deadline=None, max_examples=150)
@given(ACTIONS, st.sampled_from([None, 24 * MIB, 50 * MIB, 121 * MIB]), st.booleans())
def test_any_sequence_gives_what_the_slow_model_gives(actions, capacity, expandable):
    both_agree(actions, capacity=capacity, expandable_segments=expandable)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("capacity", [None, 150 * MIB, 401 * MIB])
@pytest.mark.parametrize("seed", range(2))
def test_a_long_sequence_gives_what_the_slow_model_gives(seed, capacity, expandable):
    both_agree(random_actions(seed, 500), capacity=capacity, expandable_segments=expandable)


@pytest.mark.parametrize("expandable", [False, True])
def test_ten_thousand_pairs_with_thousands_in_use_take_no_linear_scan(expandable):
    # 0.1 s on two shared cores; a scan over the blocks in use or free at each call takes minutes
    rng = random.Random(0)
    sizes = [rng.choice([rng.randrange(1, MIB), rng.randrange(1, 8 * MIB)]) for _ in range(10_000)]
    order = list(range(10_000))
    rng.shuffle(order)
    events = [(i, n) for i, n in enumerate(sizes)] + [(i, -1) for i in order]
    started = time.process_time()
    allocator = replay(events, expandable_segments=expandable)
    assert time.process_time() - started < 2
    assert allocator.allocated == 0
    assert state(allocator) == state(replay(events, expandable_segments=expandable))


# ---- against a CUDA device ----

ON_THE_DEVICE = """
import json, sys, torch
todo = json.load(sys.stdin)
if todo["capacity"]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(todo["capacity"] / total)
held, states = {}, []
for name, num_bytes in todo["events"]:
    if num_bytes == -1:
        held.pop(name, None)
    else:
        try:
            held[name] = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pass
    stats = torch.cuda.memory_stats()
    states.append([
        torch.cuda.memory_allocated(), torch.cuda.memory_reserved(),
        torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(),
        stats["num_alloc_retries"] if stats else 0,
    ])
print(json.dumps(states))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device")
@pytest.mark.parametrize(
    # a fraction of the memory also bars an expandable segment by the size that it would not map
    ("capacity", "expandable"),
    [(None, False), (None, True), (401 * MIB, False)],
)
def test_a_device_holds_what_the_simulation_says_after_each_event(capacity, expandable):
    options = {"capacity": capacity, "expandable_segments": expandable}
    fast, slow = CachingAllocator(**options), SlowModel(**options)
    events, expected, live = [], [], []
    for action, n in random_actions(0, 1500):
        if action == "free" and live:
            handle = live.pop(n % len(live))
            events.append((handle, -1))
            fast.free(handle)
            slow.free(handle)
        # where equal blocks differ the driver's addresses decide, which no rule foretells
        elif action == "malloc" and not slow.depends_on_addresses(n):
            name = len(events) + 10**6
            try:
                name = slow.malloc(n)
                assert fast.malloc(n) == name
                live.append(name)
            except OutOfMemory:
                with pytest.raises(OutOfMemory):
                    fast.malloc(n)
            events.append((name, n))
        else:
            continue
        expected.append(list(state(fast)))
    # a process of its own, since what other tests hold would change every number
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_DEVICE],
        input=json.dumps({"events": events, "capacity": capacity}),
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(events) > 1000
    assert json.loads(done.stdout) == expected
