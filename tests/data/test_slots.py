"""Batches come out of a worker's slots as they were made, and a slot is used again only then."""

from __future__ import annotations

import gc
import os
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lbaccel import BatchPlan, UpdateLoader
from lbaccel.data import slots as module
from lbaccel.data.slots import InSlot, Slots, loaded, slots_for
from lbaccel.errors import InputError

COUNT = 64


class Numbered:
    """Bytes [n, 5] of a sample are its index; `finish` looks at them late, and copies nothing."""

    __lbaccel_bytes__ = (5,)

    def __len__(self):
        return COUNT

    def __lbaccel_load__(self, indices, epochs, *, out=None):
        ours = out is not None
        out = torch.empty(len(indices), 5, dtype=torch.uint8) if out is None else out
        out.copy_(torch.from_numpy(indices)[:, None])
        return out, torch.full((len(indices),), int(ours))


def batches(workers, *, sizes=(4,), slow=0.0):
    """(index of each sample, whether it came through a slot) of an epoch, in order."""
    plan = BatchPlan(global_batch_size=32, micro_batch_size=sizes[0])
    loader = UpdateLoader(Numbered(), plan, num_workers=workers, seed=3)
    rows, through = [], []
    for update in loader:
        for _, (found, ours) in update:
            time.sleep(slow)
            assert torch.equal(found, found[:, :1].expand(-1, 5))
            rows += found[:, 0].tolist()
            through += ours.tolist()
    loader.close()
    return rows, through


def worker(monkeypatch, number):
    monkeypatch.setattr(module, "get_worker_info", lambda: SimpleNamespace(id=number))


@pytest.mark.parametrize("workers", [1, 2])
def test_no_batch_is_written_over_while_it_is_read(workers):
    expected, _ = batches(0)
    found, through = batches(workers, slow=0.01)  # the workers are ahead as far as they will
    assert found == expected
    assert sum(through) == COUNT  # three slots are enough, for every batch


def test_a_worker_has_three_of_its_own_and_goes_another_way_without(monkeypatch):
    slots = Slots(2, 40)
    assert slots.taken((4, 5)) is None  # no worker
    worker(monkeypatch, 1)
    taken = [slots.taken((8, 5)) for _ in range(4)]
    assert [slot.number for slot, _ in taken[:3]] == [3, 4, 5]
    assert taken[3] is None
    for value, (_, out) in enumerate(taken[:3], start=1):
        out.fill_(value)
    assert [int(out.sum()) for _, out in taken[:3]] == [40, 80, 120]
    slots.free(taken[1][0])
    assert slots.taken((1, 5))[0] == InSlot(4, (1, 5))
    worker(monkeypatch, 0)
    assert slots.taken((2, 5))[0].number == 0
    assert slots.taken((13, 5)) is None  # 65 bytes in 40, which are 64 with what lies between


def test_a_batch_that_fails_gives_its_slot_back(monkeypatch):
    slots = Slots(1, 20)
    worker(monkeypatch, 0)

    def fails(indices, epochs, *, out=None):
        raise InputError("0.jpg can't be read")

    rows = np.arange(4)
    for _ in range(5):
        with pytest.raises(InputError):
            loaded(partial(fails, rows, rows), slots, (4, 5))
    load = partial(Numbered().__lbaccel_load__, rows, rows)
    through = [int(loaded(load, slots, (4, 5))[1][0]) for _ in range(4)]
    assert through == [1, 1, 1, 0]


@pytest.mark.parametrize("kind", [tuple, list])  # DataLoader makes a list where it pins memory
def test_the_main_process_opens_a_batch_and_gives_the_slot_back_after_it(monkeypatch, kind):
    slots = Slots(1, 20)
    worker(monkeypatch, 0)
    rows = np.arange(4)
    load = Numbered().__lbaccel_load__
    made = [loaded(partial(load, rows + i, rows), slots, (4, 5)) for i in range(3)]
    opened = slots.opened([kind(batch) for batch in made])
    for start, (found, ours) in enumerate(opened):
        assert found[:, 0].tolist() == [start, start + 1, start + 2, start + 3]
        assert ours.tolist() == [1] * 4
        assert (slots.taken((4, 5)) is None) == (start == 0)  # what is taken here stays taken
    others = ["a failure", (), [1, 2]]
    assert list(slots.opened(others)) == others


def test_a_pass_that_is_collected_with_its_memory_is_no_failure(monkeypatch):
    """The memory may go before the generator that gives its slot back: both lie in one cycle."""
    failed = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    slots = Slots(1, 20)
    passed = slots.opened([(InSlot(0, (4, 5)), "labels")])
    next(passed)
    cycle = {"slots": slots, "passed": passed}
    cycle["itself"] = cycle
    number = slots._memory.address[1]
    del slots, passed, cycle
    gc.collect()
    assert not failed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)  # it is closed all the same


def test_none_are_made_where_nothing_would_use_them():
    assert slots_for((5,), num_workers=0, batch_size=4) is None
    assert slots_for(None, num_workers=2, batch_size=4) is None
    assert slots_for((5,), num_workers=2, batch_size=4) is not None
