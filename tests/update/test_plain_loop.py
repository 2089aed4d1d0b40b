"""Lines of a plain loop that are left over around `update`: each is one sentence."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader

PLAN = BatchPlan(global_batch_size=8, micro_batch_size=4)
DATA = TensorDataset(torch.randn(32, 5), torch.arange(32) % 3)


def make(scheduler=None, loader=None, accelerator=None):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    large_batch = LargeBatch(accelerator or Accelerator(cpu=True), PLAN)
    loader = UpdateLoader(DATA, PLAN) if loader is None else loader
    moved = None if scheduler is None else scheduler(optimizer)
    prepared = large_batch.prepare(model, optimizer, loader, moved)
    return large_batch, *prepared


def one_sentence(caught, *words):
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def halving(optimizer):
    return LambdaLR(optimizer, lambda update: 0.5**update)


def two_in_a_row(optimizer):
    parts = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
    return SequentialLR(optimizer, parts, milestones=[2])


@pytest.mark.parametrize("make_scheduler", [halving, two_in_a_row])
def test_the_users_own_scheduler_step_is_noticed_at_the_next_update(make_scheduler):
    large_batch, model, _, loader, scheduler = make(make_scheduler)
    first, second = next(iter(loader)), next(iter(loader))
    large_batch.update(first, cross_entropy)
    scheduler.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as caught:
        large_batch.update(second, cross_entropy)
    one_sentence(caught, "scheduler.step() was called once", "Delete that line")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_scheduler_that_was_not_given_is_the_users_to_step():
    large_batch, _, optimizer, loader = make()
    scheduler = halving(optimizer.optimizer)
    for update in loader:
        large_batch.update(update, cross_entropy)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_going_to_a_saved_state_is_no_step_of_the_users():
    large_batch, _, _, loader, scheduler = make(halving)
    start = copy.deepcopy(scheduler.state_dict())
    for update in loader:
        large_batch.update(update, cross_entropy)
    things = (large_batch, loader, scheduler)
    end = [copy.deepcopy(thing.state_dict()) for thing in things]
    scheduler.load_state_dict(start)  # back, by itself
    large_batch.update(next(iter(loader)), cross_entropy)
    assert scheduler.last_epoch == 1
    for thing, state in zip(things, end, strict=True):  # ahead, with all that belongs to it
        thing.load_state_dict(state)
    large_batch.update(next(iter(loader)), cross_entropy)
    assert scheduler.last_epoch == 5


def test_the_users_own_optimizer_step_is_refused_before_it_writes():
    large_batch, model, optimizer, loader = make()
    large_batch.update(next(iter(loader)), cross_entropy)
    cross_entropy(model, next(iter(DataLoader(DATA, 4)))).backward()
    before = copy.deepcopy(model.state_dict())
    for step in (optimizer.step, optimizer.optimizer.step):
        with pytest.raises(InputError) as caught:
            step()
        one_sentence(caught, "optimizer.step() was called outside of an update", "Delete that line")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    large_batch.update(next(iter(loader)), cross_entropy)


def test_an_optimizer_step_inside_the_loss_function_is_refused_too():
    large_batch, _, optimizer, loader = make()

    def loss_fn(model, micro_batch):
        loss = cross_entropy(model, micro_batch)
        optimizer.step()
        return loss

    with pytest.raises(InputError, match=r"optimizer\.step\(\) was called outside"):
        large_batch.update(next(iter(loader)), loss_fn)


def test_the_optimizer_is_the_users_again_when_its_large_batch_is_gone():
    large_batch, model, optimizer, loader = make()
    large_batch.update(next(iter(loader)), cross_entropy)
    large_batch.accelerator._custom_objects.clear()
    del large_batch
    gc.collect()
    before = copy.deepcopy(model.state_dict())
    cross_entropy(model, next(iter(DataLoader(DATA, 4)))).backward()
    optimizer.optimizer.step()
    assert not torch.equal(before["weight"], model.state_dict()["weight"])


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_second_large_batch_takes_the_optimizer_over(wrapped):
    first, model, optimizer, loader = make()
    first.update(next(iter(loader)), cross_entropy)
    second = LargeBatch(first.accelerator, PLAN)
    given = optimizer if wrapped else optimizer.optimizer
    model, optimizer, loader = second.prepare(model, given, loader)
    assert second.update(next(iter(loader)), cross_entropy).applied
    with pytest.raises(InputError, match="outside of an update"):
        optimizer.step()
    assert first.num_updates == 1  # it lives


def test_accumulate_around_an_update_is_refused_in_the_first_one():
    accelerator = Accelerator(cpu=True)
    large_batch, model, _, loader = make(accelerator=accelerator)
    with accelerator.accumulate(model), pytest.raises(InputError) as caught:
        large_batch.update(next(iter(loader)), cross_entropy)
    one_sentence(caught, "accelerator.accumulate(model)", "Take update() out of it")
    large_batch.update(next(iter(loader)), cross_entropy)


def test_a_number_of_accumulation_steps_that_is_set_later_does_not_swallow_the_step():
    accelerator = Accelerator(cpu=True)
    large_batch, model, _, loader = make(accelerator=accelerator)
    accelerator.gradient_accumulation_steps = 4
    with accelerator.accumulate(model), pytest.raises(InputError, match="Take update"):
        large_batch.update(next(iter(loader)), cross_entropy)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_plain_data_loader_is_refused_by_prepare(prepare):
    loader = DataLoader(DATA, batch_size=8)
    loader = Accelerator(cpu=True).prepare(loader) if prepare else loader
    with pytest.raises(InputError) as caught:
        make(loader=loader)
    one_sentence(caught, "Use UpdateLoader(dataset, plan)")


def test_a_batch_in_the_place_of_an_update_is_refused():
    large_batch, *_ = make()
    with pytest.raises(InputError) as caught:
        large_batch.update(next(iter(DataLoader(DATA, 8))), cross_entropy)
    one_sentence(caught, "update() got a list", "for update in loader")


class NeedsAnEpoch:
    """As timm's schedulers are."""

    def step(self, epoch, metric=None):
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (ReduceLROnPlateau, ["ReduceLROnPlateau", "call scheduler.step(loss) after each"]),
        (lambda _: NeedsAnEpoch(), ["NeedsAnEpoch", "lr_scheduler(optimizer, schedule"]),
        (lambda _: object(), ["object", "lr_scheduler(optimizer, schedule"]),
        (lambda o: Accelerator(cpu=True).prepare(halving(o)), ["not prepared"]),
    ],
)
def test_a_scheduler_that_an_update_cannot_move_is_refused_before_anything_is(scheduler, words):
    with pytest.raises(InputError) as caught:
        make(scheduler)
    one_sentence(caught, *words)


def test_a_plateau_scheduler_of_the_users_own_is_followed():
    large_batch, _, optimizer, loader = make()
    scheduler = ReduceLROnPlateau(optimizer.optimizer, factor=0.1, patience=0)
    large_batch.update(next(iter(loader)), cross_entropy)
    for _ in range(2):
        scheduler.step(1.0)
    large_batch.update(next(iter(loader)), cross_entropy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_refused_objects_leave_the_large_batch_ready_for_the_right_ones():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    large_batch = LargeBatch(Accelerator(cpu=True), PLAN)
    with pytest.raises(InputError):
        large_batch.prepare(model, optimizer, DataLoader(DATA))
    _, _, loader = large_batch.prepare(model, optimizer, UpdateLoader(DATA, PLAN))
    assert large_batch.update(next(iter(loader)), cross_entropy).applied
    assert re.fullmatch("Linear", type(model).__name__)
