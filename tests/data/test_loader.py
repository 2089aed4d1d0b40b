from __future__ import annotations

import os
import random
import weakref

import numpy as np
import pytest
import torch
from PIL import UnidentifiedImageError

from lbaccel.batch.plan import BatchPlan
from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import InputError


class Noisy:
    """A sample is its index and a draw from each generator that transforms use."""

    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([index, *draws], dtype=torch.float64)


def plan_of(batch=8, micro=4, world=1, norm=None):
    return BatchPlan(
        global_batch_size=batch, micro_batch_size=micro, world_size=world, norm_batch_size=norm
    )


def read(loader, epochs=2):
    """Per update: the rank's samples in order, fillers left out."""
    return [
        torch.cat([data for micro, data in update if not micro.is_filler] or [torch.zeros(0, 4)])
        for _ in range(epochs)
        for update in loader
    ]


@pytest.mark.parametrize("last_update", ["wrap", "keep", "drop"])
def test_length_is_what_is_yielded_and_each_index_comes_once_an_epoch(last_update):
    loader = UpdateLoader(Noisy(21), plan_of(), last_update=last_update)
    stream = []
    for epoch in range(4):
        assert loader.epoch == epoch
        expected = len(loader)
        updates = [[data for _, data in update] for update in loader]
        assert len(updates) == expected
        stream += [int(i) for update in updates for data in update for i in data[:, 0]]
    per_epoch = {"wrap": 21, "keep": 21, "drop": 16}[last_update]
    for epoch in range(3):
        seen = stream[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert len(set(seen)) == per_epoch


def test_no_plan_changes_samples_order_or_random_numbers():
    truth = read(UpdateLoader(Noisy(), plan_of(micro=8), seed=3))
    for micro, norm in ((1, None), (3, None), (2, 2), (6, 3)):
        found = read(UpdateLoader(Noisy(), plan_of(micro=micro, norm=norm), seed=3))
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    for world in (2, 3):
        plan = plan_of(micro=2, world=world, norm=2)
        ranks = [read(UpdateLoader(Noisy(), plan, rank=r, seed=3)) for r in range(world)]
        for parts, whole in zip(zip(*ranks, strict=True), truth, strict=True):
            assert torch.equal(torch.cat(parts), whole)
            assert all(len(part) for part in parts)
    other = read(UpdateLoader(Noisy(), plan_of(micro=8), seed=4))
    assert not torch.equal(other[0], truth[0])


def test_draws_differ_between_epochs_and_samples():
    rows = torch.cat(read(UpdateLoader(Noisy(), plan_of(batch=20, micro=20)), epochs=3))
    for column in range(1, 4):
        assert len(rows[:, column].unique()) == len(rows)


def test_workers_change_nothing():
    truth = read(UpdateLoader(Noisy(), plan_of()))
    found = read(UpdateLoader(Noisy(), plan_of(), num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_the_users_random_state_is_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    read(UpdateLoader(Noisy(), plan_of()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_going_on_after_a_break_and_after_a_half_read_update():
    truth = read(UpdateLoader(Noisy(), plan_of()))
    loader = UpdateLoader(Noisy(), plan_of())
    found = []
    for update in loader:
        found.append(torch.cat([data for _, data in update]))
        break
    for update in loader:
        next(iter(update))
        break
    found.append(truth[1])
    found += read(loader, epochs=2)[: len(truth) - 2]
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_update_that_was_read_in_part_is_read_anew_from_its_start(workers):
    truth = [data for _, data in UpdateLoader(Noisy(), plan_of()).peek()]
    loader = UpdateLoader(Noisy(), plan_of(), num_workers=workers)
    next(iter(loader.peek()))
    again = [data for _, data in loader.peek().recut(4)]
    assert len(truth) == 2 and all(torch.equal(a, b) for a, b in zip(again, truth, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_update_cut_anew_leaves_the_loader_and_what_it_loads_ahead_alone(workers):
    loader = UpdateLoader(Noisy(), plan_of(), num_workers=workers)
    updates = iter(loader)
    next(updates)
    for _ in (update := next(updates)):
        pass
    ahead, truth = loader._batches, read(UpdateLoader(Noisy(), plan_of()))
    assert torch.equal(torch.cat([data for _, data in update.recut(2)]), truth[1])
    assert [m.num_samples for m, _ in loader.peek().recut(3)] == [3, 3, 2]
    assert loader.plan == plan_of() and loader._batches is ahead and ahead is not None
    assert [m.num_samples for m, _ in next(updates)] == [4, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_size_that_is_set_holds_for_the_updates_to_come_and_changes_no_sample(workers):
    truth = read(UpdateLoader(Noisy(), plan_of()), epochs=1)
    loader, found, sizes = UpdateLoader(Noisy(), plan_of(), num_workers=workers), [], []
    for update in loader:
        parts = [(m.num_samples, data) for m, data in update]
        sizes.append([size for size, _ in parts])
        found.append(torch.cat([data for _, data in parts]))
        loader.set_micro_batch_size(3)
    assert sizes == [[4, 4], [3, 3, 2], [3, 3, 2]]
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_size_that_is_set_while_an_update_is_read_lets_that_one_end_as_it_was_cut():
    loader = UpdateLoader(Noisy(), plan_of(micro=2))
    truth = [data for _, data in UpdateLoader(Noisy(), plan_of(micro=2)).peek()]
    reading = iter(loader.peek())
    found = [next(reading)[1]]
    loader.set_micro_batch_size(8)
    found += [data for _, data in reading]
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_size_that_cuts_a_ghost_batch_can_not_be_set():
    loader = UpdateLoader(Noisy(), plan_of(norm=2))
    with pytest.raises(InputError, match="no multiple of norm_batch_size=2"):
        loader.set_micro_batch_size(3)


def test_state_is_where_the_next_update_starts():
    loader = UpdateLoader(Noisy(), plan_of())
    next(iter(loader))
    state = loader.state_dict()
    other = UpdateLoader(Noisy(), plan_of())
    other.load_state_dict(state)
    truth = read(UpdateLoader(Noisy(), plan_of()))
    assert all(torch.equal(a, b) for a, b in zip(read(other), truth[1:], strict=True))


class Broken(Noisy):
    @property
    def samples(self):
        return [(f"images/{i}.jpg", 0) for i in range(20)]

    def __getitem__(self, index):
        if index == 7:
            raise UnidentifiedImageError("cannot identify image file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_without_a_traceback(workers):
    with pytest.raises(InputError) as error:
        read(UpdateLoader(Broken(), plan_of(), num_workers=workers))
    assert str(error.value) == (
        "sample 7 (images/7.jpg) can't be read: cannot identify image file."
    )


def test_a_batch_above_the_data_set_warns_and_is_the_whole_set():
    with pytest.warns(UserWarning, match="above the training set's 20 samples"):
        loader = UpdateLoader(Noisy(), plan_of(batch=64, micro=8))
    (update,) = loader
    assert sum(micro.num_samples for micro, _ in update) == 20 == update.num_samples


def test_a_rank_outside_and_an_empty_set_are_refused():
    with pytest.raises(InputError, match="rank=2 is not in"):
        UpdateLoader(Noisy(), plan_of(world=2), rank=2)
    with pytest.raises(InputError, match="empty"):
        UpdateLoader(Noisy(0), plan_of())


def test_a_users_own_fetch_is_not_called():
    class Downloaded(Noisy):
        def fetch(self, url, retries=3):
            raise AssertionError("fetch is the user's")

    truth, found = (read(UpdateLoader(kind(), plan_of())) for kind in (Noisy, Downloaded))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_set_that_makes_whole_micro_batches_is_given_indices_and_epochs():
    class Made:
        def __len__(self):
            return 20

        def __lbaccel_fetch__(self, indices, epochs):
            assert indices.dtype == epochs.dtype == np.int64
            return torch.from_numpy(np.stack([indices, epochs], 1))

    rows, truth = (torch.cat(read(UpdateLoader(kind(), plan_of()))) for kind in (Made, Noisy))
    assert torch.equal(rows[:, 0], truth[:, 0].long())
    assert rows[:, 1].tolist() == [0] * 20 + [1] * 20


class LoadedWhole:
    """Its micro-batches are made in the workers: index, epoch, and the process that made it."""

    def __init__(self, broken=-1):
        self.broken = broken

    def __len__(self):
        return 20

    def __lbaccel_load__(self, indices, epochs):
        if self.broken in indices:
            raise InputError(f"sample {self.broken} can't be read")
        assert indices.dtype == epochs.dtype == np.int64
        return torch.from_numpy(np.stack([indices, epochs, np.full_like(indices, os.getpid())], 1))

    def __lbaccel_finish__(self, data, indices, epochs):
        assert data[:, :2].T.tolist() == [indices.tolist(), epochs.tolist()]
        return torch.cat([data, torch.full((len(data), 1), os.getpid())], 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_that_loads_whole_micro_batches_does_so_in_the_workers(workers):
    loader = UpdateLoader(LoadedWhole(), plan_of(), num_workers=workers)
    rows = torch.cat(read(loader))
    truth = torch.cat(read(UpdateLoader(Noisy(), plan_of())))
    loader.close()
    assert torch.equal(rows[:, 0], truth[:, 0].long())
    assert rows[:, 1].tolist() == [0] * 20 + [1] * 20
    assert set(rows[:, 3].tolist()) == {os.getpid()}
    pids = set(rows[:, 2].tolist())
    assert pids == {os.getpid()} if not workers else len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_set_refuses_in_a_worker_is_told_in_its_own_words(workers):
    loader = UpdateLoader(LoadedWhole(broken=3), plan_of(), num_workers=workers)
    with pytest.raises(InputError, match=r"^sample 3 can't be read$"):
        read(loader)
    loader.close()


def test_a_set_without_samples_to_read_is_refused_with_what_to_write():
    class Old:
        def __len__(self):
            return 20

        def fetch(self, indices, epochs):
            return torch.zeros(len(indices))

    with pytest.raises(InputError, match=r"a Old, has neither __getitem__ nor __lbaccel_fetch__"):
        UpdateLoader(Old(), plan_of())


def test_the_loader_never_holds_a_global_batch():
    alive = weakref.WeakSet()
    most = 0

    class Watched:
        def __len__(self):
            return 64

        def __lbaccel_fetch__(self, indices, epochs):
            data = torch.zeros(len(indices))
            alive.add(data)
            return data

    (update,) = UpdateLoader(Watched(), plan_of(batch=64, micro=4))
    for _, data in update:
        del data
        most = max(most, len(alive))
    assert 1 <= most <= 2
