"""Running averages that a forward moves: declared, they move as by the whole batch."""

from __future__ import annotations

import copy

import forks
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import visiting_order

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader, apply_activation_checkpointing

COUNT = 23


class Prototypes(nn.Module):
    """Reads centers, and then moves them by the samples' mean: each way in which users write."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        start = torch.linspace(-1, 1, 6, dtype=torch.float64)
        if how == "buffer":
            self.register_buffer("centers", start)
        elif how in ("parameter", "data"):
            self.centers = nn.Parameter(start, requires_grad=False)
        else:
            self.centers = start  # a plain attribute

    def forward(self, x):
        out = torch.tanh(x - self.centers.clone())
        mean = x.detach().mean(0)
        with torch.no_grad():
            if self.how == "data":
                self.centers.data.mul_(0.9).add_(0.1 * mean)
            elif self.how == "rebound":
                self.centers = 0.9 * self.centers + 0.1 * mean
            else:
                self.centers.mul_(0.9).add_(0.1 * mean)
        return out


HOWS = ("buffer", "parameter", "data", "rebound", "plain")


def network(how):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 6), Prototypes(how))
    return nn.Sequential(nn.Sequential(block), nn.Linear(6, 4)).double()


class OfTheLoss:
    """A loss with a momentum encoder and a plain tensor of its own."""

    def __init__(self, model):
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.mean = torch.zeros(4, dtype=torch.float64)

    def __call__(self, model, micro_batch):
        x, y = micro_batch
        out = model(x)
        with torch.no_grad():
            target = self.teacher(x) - self.mean
        self.mean = 0.7 * self.mean + 0.3 * out.detach().mean(0)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return F.cross_entropy(out, y) + F.mse_loss(out, target)


def plain_loss(model, micro_batch):
    x, y = micro_batch
    return F.cross_entropy(model(x), y)


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (COUNT,), generator=generator)


def whole(model, loss_fn, num_updates):
    """Plain torch on the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = samples()
    for epoch in range(num_updates):
        order = visiting_order(COUNT) if epoch == 0 else epoch_order(epoch)
        optimizer.zero_grad()
        loss_fn(model, (x[order], y[order])).backward()
        optimizer.step()


def epoch_order(epoch):
    from lbaccel.data.order import epoch_order

    return epoch_order(0, epoch, COUNT).copy()


def planned(model, loss_fn, micro, *, accelerator=None, checkpointing=False, num_updates=3, **how):
    accelerator = accelerator or Accelerator(cpu=True)
    if checkpointing:
        apply_activation_checkpointing(model, ["0"])
    plan = BatchPlan(
        global_batch_size=COUNT, micro_batch_size=int(micro), world_size=accelerator.num_processes
    )
    large_batch = LargeBatch(accelerator, plan, **how)
    loader = UpdateLoader(TensorDataset(*samples()), plan, rank=accelerator.process_index)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    for _ in range(num_updates):
        for update in loader:
            large_batch.update(update, loss_fn)
    return large_batch


def state(model, how):
    named = dict(model.state_dict())
    return (
        named
        if how in ("buffer", "parameter", "data")
        else named | {"centers": model[0][0][1].centers}
    )


def apart(found, truth):
    return max(float((found[k] - truth[k]).norm() / truth[k].norm()) for k in truth)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_declared_average_of_the_model_moves_as_by_the_whole_batch(how, checkpointing):
    truth = network(how)
    whole(truth, plain_loss, 3)
    for micro in (1, *np.random.default_rng(0).integers(2, COUNT, 2).tolist(), COUNT):
        model = network(how)
        planned(model, plain_loss, micro, checkpointing=checkpointing, averages=["0.0.1.centers"])
        assert apart(state(model, how), state(truth, how)) < 1e-12


def test_a_module_s_name_declares_all_of_it_in_the_loss_too():
    torch.manual_seed(0)
    truth = nn.Sequential(nn.Linear(3, 4)).double()
    start = copy.deepcopy(truth)
    loss_fn = OfTheLoss(truth)
    whole(truth, loss_fn, 3)
    for micro in (1, 5, 9, COUNT):
        model = copy.deepcopy(start)
        mine = OfTheLoss(model)
        planned(model, mine, micro, averages=["loss_fn.teacher", "loss_fn.mean"])
        assert apart(model.state_dict(), truth.state_dict()) < 1e-12
        assert apart(mine.teacher.state_dict(), loss_fn.teacher.state_dict()) < 1e-12
        assert apart({"mean": mine.mean}, {"mean": loss_fn.mean}) < 1e-12


def on_ranks(rank, how, micro):
    model = network(how)
    planned(model, plain_loss, micro, accelerator=Accelerator(cpu=True), averages=["0.0.1.centers"])
    return {k: v.tolist() for k, v in state(model, how).items()}


@pytest.mark.parametrize(("how", "micro"), [("buffer", 4), ("rebound", 7)])
def test_two_ranks_move_a_declared_average_as_one_process(how, micro):
    truth = network(how)
    whole(truth, plain_loss, 3)
    found = forks.values(forks.run_forked(on_ranks, how, micro, world_size=2))
    assert found[0] == found[1]
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in found[0].items()}
    assert apart(tensors, state(truth, how)) < 1e-12


def test_an_attempt_that_fails_leaves_the_average_where_it_was():
    model, calls = network("buffer"), []
    before = model[0][0][1].centers.clone()

    def failing(model, micro_batch):
        calls.append(len(calls))
        loss = plain_loss(model, micro_batch)
        if len(calls) == 3:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        planned(model, failing, 4, averages=["0.0.1.centers"])
    assert torch.equal(model[0][0][1].centers, before)


def test_memory_that_runs_out_drops_the_average_with_the_attempt():
    truth, model, calls = network("buffer"), network("buffer"), []
    whole(truth, plain_loss, 1)

    def short(model, micro_batch):
        loss = plain_loss(model, micro_batch)
        calls.append(len(micro_batch[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    planned(model, short, 8, num_updates=1, averages=["0.0.1.centers"])
    assert max(calls[2:]) < 8
    assert apart(state(model, "buffer"), state(truth, "buffer")) < 1e-12


def test_an_average_that_cannot_be_one_is_refused_with_the_reason():
    for name, text in (
        ("0.0.1.center", r"holds no tensor.*'0\.0\.1\.centers'"),
        ("1.weight", "trained by the optimizer"),
    ):
        with pytest.raises(InputError, match=text):
            planned(network("buffer"), plain_loss, 4, averages=[name])
    with pytest.raises(InputError, match="give a list"):
        planned(network("buffer"), plain_loss, 4, averages="0.0.1.centers")


class MovesFirst(Prototypes):
    def forward(self, x):
        with torch.no_grad():
            self.centers.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x * self.centers


def test_a_gradient_through_a_moved_average_is_an_error_that_says_what_to_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), MovesFirst("buffer"), nn.Linear(6, 4)).double()
    with pytest.raises(InputError, match="Read the average first"):
        planned(model, plain_loss, 4, averages=["1.centers"])
