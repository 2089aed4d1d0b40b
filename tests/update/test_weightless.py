"""Micro-batches without a valid label: the update is that of the whole batch."""

from __future__ import annotations

import math

import forks
import pytest
import torch
from accelerate import Accelerator
from reference import relative_error
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lbaccel import BatchPlan, LargeBatch, NoiseScale
from lbaccel.data.loader import Update
from lbaccel.update.accumulation import accumulate

COUNT, NORM, IGNORED = 24, 4, -100
EMPTY = [0, 1, 2, 3, 12, 13, 14, 15]  # the first ghost batch and the fourth


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (COUNT,), generator=generator)
    y[EMPTY] = IGNORED
    return x, y


def by_torch(model, micro_batch):
    """The loss is nan without a valid label."""
    x, y = micro_batch
    return F.cross_entropy(model(x), y, ignore_index=IGNORED), (y != IGNORED).sum()


def by_hand(model, micro_batch):
    """Loss and gradient are nan without a valid label."""
    x, y = micro_batch
    valid = y != IGNORED
    chosen = F.log_softmax(model(x), dim=1).gather(1, y.clamp(min=0)[:, None])[:, 0]
    return -(chosen * valid).sum() / valid.sum(), valid.sum()


def on_the_host(model, micro_batch):
    loss, weight = by_hand(model, micro_batch)
    return loss, float(weight)


def whole_batch():
    """Loss, gradients and buffers in plain torch, one ghost batch after the other."""
    model, (x, y) = make_network(), make_samples()
    valid, total = (y != IGNORED).sum(), 0.0
    for rows in torch.arange(COUNT).tensor_split(COUNT // NORM):
        loss = F.cross_entropy(model(x[rows]), y[rows], ignore_index=IGNORED, reduction="sum")
        (loss / valid).backward()
        total += float(loss.detach() / valid)
    return total, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def updates_of(rank, world_size, micro):
    plan = BatchPlan(
        global_batch_size=COUNT, micro_batch_size=micro, world_size=world_size, norm_batch_size=NORM
    )
    x, y = make_samples()
    parts = [(m, slice(m.start, m.start + m.num_samples)) for m in plan.partition(rank)]
    return plan, Update(0, COUNT, [(m, (x[p], y[p])) for m, p in parts])


def run(loss_fn, micro, *, shard=False, **options):
    """The errors of loss, gradients and buffers, of an update by SGD at rate 1 without clipping."""
    accelerator = Accelerator(cpu=True)
    plan, update = updates_of(accelerator.process_index, accelerator.num_processes, micro)
    model = make_network()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    if shard:
        fully_shard(model)
    large_batch = LargeBatch(accelerator, plan, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bare = model
    model, optimizer, _ = large_batch.prepare(model, optimizer, [update])
    result = large_batch.update(update, loss_fn)
    ends = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in bare.named_parameters()}
    loss, gradients, buffers = whole_batch()
    return (
        abs(result.loss - loss) / loss,
        relative_error({n: start[n] - ends[n].detach() for n in start}, gradients),
        relative_error(dict(bare.named_buffers()), buffers),
    )


@pytest.mark.parametrize("loss_fn", [by_torch, by_hand, on_the_host])
@pytest.mark.parametrize("micro", [4, 8, 24])
def test_an_update_with_empty_micro_batches_is_that_of_the_whole_batch(loss_fn, micro):
    assert max(run(loss_fn, micro)) < 1e-12


def test_loss_and_gradient_of_an_empty_micro_batch_are_nan_so_that_equality_means_something():
    model, (x, y) = make_network(), make_samples()
    assert by_torch(model, (x[:4], y[:4]))[0].isnan()
    by_hand(model, (x[:4], y[:4]))[0].mul(0.0).backward()
    assert all(p.grad.isnan().any() for p in model.parameters())


def sharded(rank, micro):
    return [max(run(loss_fn, micro, shard=True)) for loss_fn in (by_torch, by_hand)]


def replicated(rank, micro):
    return [max(run(loss_fn, micro)) for loss_fn in (by_torch, by_hand, on_the_host)]


@pytest.mark.parametrize("update", [replicated, sharded])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_with_empty_micro_batches_give_the_whole_batch(update, world_size):
    """Six ghost batches on four ranks: two of them run a filler, which is empty as well."""
    for errors in forks.values(forks.run_forked(update, 4, world_size=world_size, timeout=300)):
        assert max(errors) < 1e-12


def test_an_empty_micro_batch_is_no_unit_of_the_noise_scale():
    found = []
    for loss_fn in (by_hand, on_the_host):
        noise = NoiseScale(half_life_samples=1e4)
        assert max(run(loss_fn, 4, noise_scale=noise)) < 1e-12
        found.append(noise.average.scale_s)
    assert math.isfinite(found[0]) and found[0] == found[1] > 0


def test_a_gradient_that_is_not_finite_still_stops_where_the_micro_batch_counts():
    from lbaccel import RunFailed

    def loss_fn(model, micro_batch):
        loss, weight = by_hand(model, micro_batch)
        return loss * math.nan, weight

    with pytest.raises(RunFailed, match="the loss is nan"):
        run(loss_fn, 4)


def test_the_hooks_are_gone_after_the_update_and_after_a_failure():
    model = make_network()
    _, update = updates_of(0, 1, 4)
    accumulate(model, update, by_hand, num_samples=COUNT)
    with pytest.raises(ZeroDivisionError):
        accumulate(model, update, lambda m, b: 1 / 0, num_samples=COUNT)
    assert not any(p._backward_hooks for p in model.parameters())
