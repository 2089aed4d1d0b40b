"""Memory is used again when nothing reads it, and never before."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from lbaccel.data.reused import ReusedMemory

SHAPES = st.sampled_from([(1,), (3, 5), (2, 7), (4, 4), (6, 6)])


@given(st.lists(st.tuples(SHAPES, st.sampled_from(["kept", "a view", "gone"])), max_size=30))
def test_no_living_tensor_is_written_over(asked):
    memory, living = ReusedMemory(), []
    for number, (shape, what) in enumerate(asked):
        tensor = memory.empty(shape)
        assert tensor.shape == shape and tensor.dtype == torch.float32
        assert tensor.data_ptr() % 64 == 0  # as torch's own, in each block
        tensor.fill_(number)
        if what != "gone":
            living.append((number, tensor if what == "kept" else tensor.flatten()[-1:]))
        del tensor
        if number % 7 == 6:
            del living[::2]
        assert all(bool((found == value).all()) for value, found in living)


def test_two_batches_in_turn_stay_in_two_places():
    memory, places, old = ReusedMemory(), set(), None
    for _ in range(20):
        new = memory.empty((50, 50))
        places.add(new.data_ptr())
        old = new
    assert old is new and len(places) == 2


def test_a_short_last_batch_has_its_place_in_the_block():
    memory = ReusedMemory()
    place = memory.empty((40, 40)).data_ptr()
    assert memory.empty((30, 40)).data_ptr() == place
    assert memory.empty((40, 40)).data_ptr() == place


def test_autograd_keeps_what_it_will_read():
    memory = ReusedMemory()
    weight = torch.ones(8, requires_grad=True)
    tensor = memory.empty((8,)).fill_(3)
    loss = (weight * tensor).sum()
    del tensor
    for _ in range(4):
        memory.empty((8,)).fill_(7)
    loss.backward()
    assert weight.grad.tolist() == [3] * 8


def test_no_more_is_held_than_twice_what_is_asked_for():
    memory = ReusedMemory()
    for length in (1000, 400, 1000, 10):
        living = [memory.empty((length,)) for _ in range(3)]
        held = [len(block) for block, _ in memory._blocks]
        assert len(held) <= 2 and all(length <= size <= 2 * length for size in held)
        del living


def test_it_travels_to_a_worker_without_its_blocks():
    memory = ReusedMemory()
    memory.empty((1000,))
    assert len(pickle.dumps(memory)) < 200
    assert pickle.loads(pickle.dumps(memory)).empty((3,)).shape == (3,)
