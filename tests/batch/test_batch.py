from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbaccel.batch.plan import BatchPlan
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError


@st.composite
def plans(draw):
    norm = draw(st.one_of(st.none(), st.just("frozen"), st.integers(1, 9)))
    pairs = norm is None and draw(st.booleans())
    unit = norm if isinstance(norm, int) else 2 if pairs else 1
    world = draw(st.integers(1, 5))
    size = draw(st.integers(max(2, unit, (world - 1) * unit + 1), 200))  # a group for each rank
    return BatchPlan(
        global_batch_size=size,
        micro_batch_size=unit * draw(st.integers(1, 12)),
        world_size=world,
        norm_batch_size=norm,
        mix_pairs=pairs,
    )


def all_groups(plan, count):
    """(start, size) of each group over all ranks, fillers left out."""
    found = []
    for rank in range(plan.world_size):
        for micro in plan.partition(rank, count):
            start = micro.start
            for size in () if micro.is_filler else micro.group_sizes:
                found.append((start, size))
                start += size
    return found


@settings(deadline=None, max_examples=300)
@given(plans(), st.data())
def test_each_sample_is_in_one_micro_batch_of_one_rank(plan, data):
    count = data.draw(st.integers(1, plan.global_batch_size))
    positions = []
    steps = set()
    for rank in range(plan.world_size):
        micros = plan.partition(rank, count)
        steps.add(len(micros))
        fillers = [m.is_filler for m in micros]
        assert fillers == sorted(fillers)
        for micro in micros:
            assert 1 <= micro.num_samples <= plan.micro_batch_size
            if not micro.is_filler:
                positions += range(micro.start, micro.start + micro.num_samples)
    assert positions == list(range(count))
    assert steps == {plan.num_micro_steps(count)}


@settings(deadline=None, max_examples=300)
@given(plans(), st.data())
def test_groups_are_those_of_array_split_whatever_the_plan(plan, data):
    count = data.draw(st.integers(1, plan.global_batch_size))
    unit = plan.group_size
    if unit == 1:
        return
    truth = [(int(g[0]), len(g)) for g in np.array_split(np.arange(count), -(-count // unit))]
    assert all_groups(plan, count) == truth
    assert max(size for _, size in truth) <= unit


def test_the_equation_and_what_is_derived():
    plan = BatchPlan(global_batch_size=4096, micro_batch_size=32, world_size=4, norm_batch_size=32)
    assert plan.gradient_accumulation_steps == 4096 // 32 // 4
    assert str(plan) == (
        "global batch 4096 = 32 micro-batches x 32 samples x 4 ranks; "
        "BatchNorm over 32 samples (128 groups)"
    )
    ragged = BatchPlan(global_batch_size=10, micro_batch_size=4, norm_batch_size="frozen")
    assert "2 x 4 + 2 samples" in str(ragged) and "BatchNorm frozen" in str(ragged)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch_size": 48, "norm_batch_size": 32}, "nearest that fit are 32 and 64"),
        ({"micro_batch_size": 8, "norm_batch_size": 32}, "nearest that fit are 32 and 64"),
        ({"micro_batch_size": 3, "mix_pairs": True}, "nearest that fit are 2 and 4"),
        ({"global_batch_size": 0}, "global_batch_size=0 is not a whole number"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1"),
        ({"micro_batch_size": 2.5}, r"micro_batch_size=2\.5"),
        ({"world_size": True}, "world_size=True"),
        ({"norm_batch_size": "cold"}, "'cold' is not an integer, 'frozen', 'global' or None"),
        ({"norm_batch_size": 1024}, "larger than global_batch_size=512"),
        ({"world_size": 513}, "Use world_size <= 512"),
        ({"world_size": 17, "norm_batch_size": 32}, "Use world_size <= 16"),
        (
            {
                "global_batch_size": 11,
                "micro_batch_size": 4,
                "world_size": 4,
                "norm_batch_size": 4,
            },
            "is 3 groups of at most 4 samples, fewer than world_size=4.*Use world_size <= 3",
        ),
    ],
)
def test_a_plan_that_cannot_be_names_the_numbers_and_what_to_type(options, words):
    with pytest.raises(InputError, match=words):
        BatchPlan(**{"global_batch_size": 512, "micro_batch_size": 64, **options})


@pytest.mark.parametrize(
    ("num_samples", "updates", "last", "words"),
    [
        (512, 1000, "wrap", ["full-batch"]),
        (5119, 1000, "wrap", ["10% of the training set"]),
        (5120, 1000, "wrap", []),
        (51200, 499, "wrap", ["499 updates in all are few"]),
        (51200, 500, "wrap", []),
        (51200 + 127, 500, "keep", ["127 samples, below a quarter"]),
        (51200 + 128, 500, "keep", []),
        (51200 + 127, 500, "wrap", []),
    ],
)
def test_warnings_come_at_their_thresholds(num_samples, updates, last, words):
    plan = BatchPlan(global_batch_size=512, micro_batch_size=64)
    found = plan.warnings(num_samples=num_samples, num_updates=updates, last_update=last)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_a_batch_above_the_training_set_is_full_batch_training_and_says_so():
    plan = BatchPlan(global_batch_size=4096, micro_batch_size=32)
    text = plan.explain(num_samples=800, epochs=10)
    assert "above the training set's 800 samples" in text and "full-batch training" in text
    assert plan.capped(800).global_batch_size == 800
    assert plan.capped(4096) is plan


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 60), st.integers(0, 60), st.sampled_from(["wrap", "keep", "drop"]),
    st.integers(1, 6),
)  # fmt: skip
def test_updates_of_a_stream_follow_the_closed_form(batch, more, last, epochs):
    count = batch + more
    stream = UpdateStream(batch, count, last)
    total = sum(stream.updates_in_epoch(e) for e in range(epochs))
    truth = {
        "wrap": -(-epochs * count // batch),
        "keep": epochs * -(-count // batch),
        "drop": epochs * (count // batch),
    }[last]
    assert total == stream.num_updates(epochs) == stream.first_update(epochs) == truth
    spans = [stream.span(u) for u in range(total)]
    for u, (start, size) in enumerate(spans):
        assert stream.samples_seen(u) == sum(s for _, s in spans[:u])
        assert 1 <= size <= batch and start // count < epochs
    covered = [p for start, size in spans for p in range(start, start + size)]
    assert len(covered) == len(set(covered))
    if last == "wrap":
        assert covered == list(range(total * batch)) and {s for _, s in spans} == {batch}
    elif last == "keep":
        assert covered == list(range(epochs * count))
    else:
        assert {s for _, s in spans} == {batch}


def one_by_one(batch, count, last, growth, epochs):
    """Spans of an independent walk, sample by sample, of what `UpdateStream` computes."""
    position, spans = 0, []
    while position < epochs * count:
        epoch, offset = divmod(position, count)
        size = [batch, *(s for e, s in growth if e <= epoch)][-1]
        if last == "keep":
            size = min(size, count - offset)
        spans.append((position, size))
        position += size
    return spans


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 40), st.sampled_from(["wrap", "keep"]), st.integers(1, 7))
def test_updates_of_a_growing_batch_lie_where_a_walk_through_the_samples_puts_them(
    data, count, last, epochs
):
    sizes = st.integers(1, count)
    batch = data.draw(sizes)
    changes = sorted(data.draw(st.sets(st.integers(1, 6), max_size=4)))
    growth = tuple((epoch, data.draw(sizes)) for epoch in changes)
    stream = UpdateStream(batch, count, last, growth)
    truth = one_by_one(batch, count, last, growth, epochs)
    assert stream.num_updates(epochs) == stream.first_update(epochs) == len(truth)
    assert [stream.span(u) for u in range(len(truth))] == truth
    assert [stream.samples_seen(u) for u in range(len(truth))] == [start for start, _ in truth]
    for epoch in range(epochs):
        starts = [start for start, _ in truth if start // count == epoch]
        assert stream.updates_in_epoch(epoch) == len(starts)
        assert stream.size_in(epoch) == [batch, *(s for e, s in growth if e <= epoch)][-1]
    half = data.draw(st.sampled_from([0.5, 0.25]))
    until = round(Fraction(str(epochs - 1 + half)) * count)
    whole = one_by_one(batch, count, last, growth, epochs)
    reaching = [start for start, _ in whole if start < until]
    assert stream.num_updates(epochs - 1 + half) == max(1, len(reaching))


@pytest.mark.parametrize(
    ("growth", "last", "says"),
    [
        (((1, 8),), "drop", "every size would leave out"),
        (((2, 8), (2, 9)), "keep", "epoch 2 does not come after epoch 2"),
        (((0, 8),), "wrap", "epoch 0 does not come after"),
        (((1, 11),), "wrap", "global_batch_size=11 is above the training set's 10"),
        (((1, 0),), "wrap", "at least 1"),
    ],
)
def test_a_growth_that_can_not_be_is_refused(growth, last, says):
    with pytest.raises(InputError, match=says):
        UpdateStream(4, 10, last, growth)


def test_a_run_that_ends_on_half_a_sample_is_rounded_as_a_whole():
    """49.5 and 1.5 samples to the even number: not their part past the last whole epoch, 4.5."""
    assert UpdateStream(1, 45, "keep").num_updates(1.1) == 50
    assert UpdateStream(1, 1, "wrap").num_updates(1.5) == 2


def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_updates():
    assert UpdateStream(100, 1000, "wrap").num_updates(0.25) == 3
    assert UpdateStream(100, 1050, "drop").num_updates(0.5) == 5
    with pytest.raises(InputError, match="above the training set"):
        UpdateStream(11, 10)
    with pytest.raises(InputError, match="'wrap', 'keep' or 'drop'"):
        UpdateStream(5, 10, "turn")


def test_ranks_share_as_many_groups_as_there_are_and_the_last_may_be_short():
    plan = BatchPlan(global_batch_size=11, micro_batch_size=4, world_size=3, norm_batch_size=4)
    shares = [[m.group_sizes for m in plan.partition(rank)] for rank in range(3)]
    assert shares == [[(4,)], [(4,)], [(3,)]]
    pairs = BatchPlan(global_batch_size=5, micro_batch_size=2, world_size=3, mix_pairs=True)
    assert [pairs.partition(rank)[0].num_samples for rank in range(3)] == [2, 2, 1]


def test_ghost_batches_of_one_sample_stay_apart():
    plan = BatchPlan(global_batch_size=5, micro_batch_size=2, norm_batch_size=1)
    assert [m.group_sizes for m in plan.partition()] == [(1, 1), (1, 1), (1,)]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.integers(1, 6))
def test_the_largest_micro_batch_is_that_of_the_partition(batch, groups, world, norm):
    if -(-batch // norm) < world or norm > batch:
        return
    plan = BatchPlan(
        global_batch_size=batch,
        micro_batch_size=groups * norm,
        world_size=world,
        norm_batch_size=norm,
    )
    counts = [len(m.group_sizes) for rank in range(world) for m in plan.partition(rank)]
    assert plan.largest_micro_batch() == max(counts) * norm
