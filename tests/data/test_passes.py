"""Passes share workers and slots, and one that is left takes neither away."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from lbaccel.data.passes import BatchPasses
from lbaccel.data.slots import loaded, slots_for

SIZE = 4


class Numbers:
    """Bytes [n, 5] of a sample are its index; sample 99 is one that can't be made."""

    def __init__(self, slots):
        self.slots = slots

    def __len__(self):
        return 100

    def __getitems__(self, rows):
        return loaded(partial(self.load, rows), self.slots, (len(rows), 5))

    def load(self, rows, *, out=None):
        if 99 in rows:
            raise MemoryError("no room for it")
        ours = out is not None
        out = torch.empty(len(rows), 5, dtype=torch.uint8) if out is None else out
        out.copy_(torch.tensor(rows)[:, None])
        return out, torch.full((len(rows),), int(ours))


@pytest.fixture
def passes():
    slots = partial(slots_for, (5,), num_workers=2, batch_size=SIZE)
    made = BatchPasses(Numbers, num_workers=2, slots=slots)
    yield made
    made.close()


def rows_of(batches, *, slow=0.0):
    """The rows of the batches, and how many of them came through a slot."""
    rows, through = [], 0
    for found, ours in batches:
        time.sleep(slow)
        assert torch.equal(found, found[:, :1].expand(-1, 5))
        rows += found[:, 0].tolist()
        through += int(ours.sum())
    return rows, through


def cut(first, last):
    return [list(range(i, min(i + SIZE, last))) for i in range(first, last, SIZE)]


def test_every_batch_comes_through_a_slot_in_each_pass(passes):
    for first in (0, 30, 7):
        expected = list(range(first, first + 41))
        assert rows_of(passes(cut(first, first + 41)), slow=0.005) == (expected, 41)


def test_a_pass_that_is_left_leaves_its_slots_free_and_its_workers(passes):
    before = set(active_children())
    assert rows_of(passes(cut(0, 40)))[1] == 40
    workers = set(active_children()) - before
    for read in (0, 1, 2, 3) * 3:  # more batches than there are slots
        half = passes(cut(40, 80))
        for _ in range(read):
            next(half)
    del half
    assert rows_of(passes(cut(0, 40)), slow=0.005) == (list(range(40)), 40)
    assert set(active_children()) - before == workers


def test_a_larger_batch_goes_another_way(passes):
    assert rows_of(passes(cut(0, 8)))[1] == 8
    assert rows_of(passes([list(range(13)), [13]])) == (list(range(14)), 1)  # 65 bytes


def test_an_error_in_a_pass_that_was_left_is_nobodys(passes):
    next(passes([[1], [2], [99], [3], [4]]))
    assert rows_of(passes(cut(0, 40)), slow=0.005) == (list(range(40)), 40)
    with pytest.raises(MemoryError, match="no room for it"):
        rows_of(passes([[1], [99], [3]]))
    assert rows_of(passes(cut(0, 20))) == (list(range(20)), 20)


def test_after_the_end_others_start(passes):
    half = passes(cut(0, 40))
    first, _ = next(half)
    passes.close()
    assert rows_of(passes(cut(40, 80))) == (list(range(40, 80)), 40)
    assert first[:, 0].tolist() == [0, 1, 2, 3]  # no new worker has written over it


def test_without_workers_there_are_no_slots():
    plain = BatchPasses(
        Numbers, num_workers=0, slots=partial(slots_for, (5,), num_workers=0, batch_size=4)
    )
    next(plain(cut(0, 40)))
    assert rows_of(plain(cut(0, 9))) == (list(range(9)), 0)


def test_a_process_that_ends_in_the_middle_of_a_pass_says_nothing():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from functools import partial\n"
        "from test_passes import Numbers, BatchPasses, cut, slots_for\n"
        "made = partial(slots_for, (5,), num_workers=1, batch_size=4)\n"
        "half = BatchPasses(Numbers, num_workers=1, slots=made)(cut(0, 40))\n"
        "print(next(half)[0][:, 0].tolist())\n"
    )
    run = [sys.executable, "-c", program, str(Path(__file__).parent)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("[0, 1, 2, 3]\n", "", 0)
