"""Keywords and loops of a plain DataLoader at an `UpdateLoader`: each is one sentence."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from lbaccel import BatchPlan, InputError, UpdateLoader

DATA = TensorDataset(torch.arange(16.0)[:, None], torch.arange(16))


def loader_of(*, micro=2):
    return UpdateLoader(DATA, BatchPlan(global_batch_size=4, micro_batch_size=micro))


def old_loop(loader):
    for images, labels in loader:
        assert images is not labels


def old_loop_with_numbers(loader):
    for _, (images, labels) in enumerate(loader):
        assert images is not labels


def old_loop_with_a_batch(loader):
    for batch in loader:
        images, labels = batch
        assert images is not labels


def three_parts(loader):
    for images, _, _ in loader:
        assert images is not None


@pytest.mark.parametrize("micro", [4, 2, 1])  # 1, 2 and 4 micro-batches: two would be taken apart
@pytest.mark.parametrize(
    "loop", [old_loop, old_loop_with_numbers, old_loop_with_a_batch, three_parts]
)
def test_an_old_loop_over_the_loader_is_told_what_to_write(loop, micro):
    with pytest.raises(InputError) as caught:
        loop(loader_of(micro=micro))
    assert "for update in loader: result = large_batch.update(update, loss_fn)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [0, "image"])
def test_a_batch_by_index_or_key_is_told_what_to_write(key):
    with pytest.raises(InputError, match=r"for update in loader"):
        next(iter(loader_of()))[key]


def test_an_update_can_be_read_by_hand_in_every_other_way():
    for read in (list, tuple, lambda update: [*update], lambda update: [x for x in update]):  # noqa: C416
        assert len(read(next(iter(loader_of())))) == 2
    ((micro_batch, _),) = next(iter(loader_of(micro=4)))
    assert micro_batch.num_samples == 4
    first, *rest = next(iter(loader_of()))
    assert first[0].start == 0 and len(rest) == 1
    assert [m.num_samples for update in loader_of() for m, _ in update] == [2] * 8
    ((first_pair, second_pair),) = [list(next(iter(loader_of())))]
    assert first_pair[0].start < second_pair[0].start


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("shuffle", True, r"UpdateLoader\(seed=...\)"),
        ("batch_size", 64, r"BatchPlan\(global_batch_size=...\)"),
        ("drop_last", True, r'last_update="drop"'),
        ("sampler", [1, 2], r"torch\.utils\.data\.Subset"),
        ("batch_sampler", [[1, 2]], r"torch\.utils\.data\.Subset"),
        ("generator", None, r"UpdateLoader\(seed=...\)"),
        ("worker_init_fn", print, r"UpdateLoader\(seed=...\)"),
        ("pin_memory", True, "Leave it out"),
        ("persistent_workers", True, "Leave it out"),
        ("prefetch_factor", 4, "known are rank, seed, .*Leave it out"),
    ],
)
def test_each_keyword_of_a_data_loader_is_told_what_stands_in_its_place(option, value, says):
    plan = BatchPlan(global_batch_size=4, micro_batch_size=2)
    with pytest.raises(InputError, match=rf"UpdateLoader\({option}=.*{says}"):
        UpdateLoader(DATA, plan, **{option: value})


def test_a_number_in_the_place_of_the_plan_and_a_set_without_a_length_are_refused():
    with pytest.raises(InputError, match=r"the second argument is the plan. Use BatchPlan"):
        UpdateLoader(DATA, 64)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(8))

    with pytest.raises(InputError, match="Stream, has no length"):
        UpdateLoader(Stream(), BatchPlan(global_batch_size=4, micro_batch_size=2))
