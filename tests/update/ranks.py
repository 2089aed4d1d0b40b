"""On each rank: the equality matrix and the transaction over several gloo ranks.

Run by torchrun, it prints one JSON line on rank 0: {"world_size", "cells": {...}, "checks": {...}}.
"""

from __future__ import annotations

import functools
import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from reference import (
    WITHOUT_BATCH_NORM,
    largest_relative_error,
    make_model,
    make_samples,
    relative_error,
    train_ghost_batches_in_turn,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from updates import one_update, visiting_order

from lbaccel import BatchPlan, LargeBatch, RunFailed, UpdateLoader

COUNT = 23
NORM = 3  # eight ghost batches: on three ranks 3, 3 and 2, so the last one runs a filler
MICRO = {"one group": 3, "ragged": 6}


def samples_of(name):
    return make_samples(COUNT, size=32 if name.startswith(("resnet10t", "vit")) else 64)


@functools.cache  # no plan changes it
def reference(name):
    images, labels = samples_of(name)
    order = visiting_order(COUNT)
    norm = None if name in WITHOUT_BATCH_NORM else NORM
    return train_ghost_batches_in_turn(make_model(name), images[order], labels[order], norm)


def cell(accelerator, name, micro, checkpointing):
    images, labels = samples_of(name)
    norm = None if name in WITHOUT_BATCH_NORM else NORM
    loss, gradients, buffers = reference(name)
    result, found, found_buffers = one_update(
        make_model(name),
        images,
        labels,
        micro_batch_size=micro,
        norm_batch_size=norm,
        checkpointing=checkpointing,
        accelerator=accelerator,
    )
    errors = [
        abs(result.loss - loss) / loss,
        relative_error(found, gradients),
        largest_relative_error(found_buffers, buffers),
    ]
    worst = torch.tensor(errors, dtype=torch.float64)
    if accelerator.num_processes > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)  # every rank holds the same
    return max(worst.tolist())


def token_weights(accelerator):
    """Each rank's micro-batches carry other weights: the sum is divided by all of them."""
    torch.manual_seed(0)
    features = torch.randn(7, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, -100, 2, -100, -100, 1])
    order = visiting_order(7)
    truth = torch.nn.Linear(4, 3).double()
    start = {k: v.clone() for k, v in truth.state_dict().items()}
    F.cross_entropy(truth(features[order]), targets[order], ignore_index=-100).backward()

    def loss_fn(model, micro_batch):
        x, y = micro_batch
        summed = F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum")
        weight = (y != -100).sum()
        return summed / weight.clamp(min=1), weight

    model = torch.nn.Linear(4, 3).double()
    model.load_state_dict(start)
    _, found, _ = one_update(
        model, features, targets, micro_batch_size=2, loss_fn=loss_fn, accelerator=accelerator
    )
    return relative_error(found, {n: p.grad for n, p in truth.named_parameters()})


def failing_rank(accelerator):
    """One rank fails in its second micro-batch: all raise, nothing is written, the next works."""
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4 * world, 3), torch.randn(4 * world, 1))
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    plan = BatchPlan(
        global_batch_size=4 * world, micro_batch_size=2, world_size=world, norm_batch_size=2
    )
    large_batch = LargeBatch(accelerator, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bare = model
    model, optimizer, loader = large_batch.prepare(
        model, optimizer, UpdateLoader(data, plan, rank=rank)
    )
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    calls = [0]

    def loss_fn(model, micro_batch):
        calls[0] += 1
        if rank == world - 1 and calls[0] == 2:
            raise ZeroDivisionError("as it happens")
        x, y = micro_batch
        return F.mse_loss(model(x), y)

    (update,) = loader
    try:
        large_batch.update(update, loss_fn)
        raised = "nothing"
    except ZeroDivisionError:
        raised = "ZeroDivisionError"
    except RunFailed as error:
        raised = f"RunFailed: {error}"
    unchanged = all(torch.equal(v, bare.state_dict()[k]) for k, v in before.items())
    (update,) = loader
    applied = large_batch.update(update, loss_fn).applied
    moved = not torch.equal(before["0.weight"], bare.state_dict()["0.weight"])
    said = [None] * world
    dist.all_gather_object(said, (raised, unchanged, applied, moved, large_batch.num_updates))
    return said


def surroundings(accelerator):
    """Wrapper type, world size, and that the ranks saw different samples."""
    world = accelerator.num_processes
    data = TensorDataset(torch.arange(8.0)[:, None])
    plan = BatchPlan(global_batch_size=8, micro_batch_size=2, world_size=world)
    large_batch = LargeBatch(accelerator, plan)
    model = torch.nn.Linear(1, 1)
    model, _, loader = large_batch.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        UpdateLoader(data, plan, rank=accelerator.process_index),
    )
    assert isinstance(model, DistributedDataParallel), type(model)
    assert not model.broadcast_buffers
    assert accelerator.num_processes == dist.get_world_size()
    (update,) = loader
    mine = [int(x) for micro, (x,) in update if not micro.is_filler for x in x]
    said = [None] * world
    dist.all_gather_object(said, mine)
    return said


def results(names):
    """The errors of the networks named, and the checks: the same on each rank."""
    accelerator = Accelerator(cpu=True)
    cells = {}
    for name in names:
        for partition, micro in MICRO.items():
            for checkpointing in (False, True):
                error = cell(accelerator, name, micro, checkpointing)
                cells[f"{name} | {partition} | {'checkpointed' if checkpointing else 'plain'}"] = (
                    error
                )
    checks = {"token_weights": token_weights(accelerator)}
    if accelerator.num_processes > 1:
        checks["failing_rank"] = failing_rank(accelerator)
        checks["samples"] = surroundings(accelerator)
    return {"world_size": accelerator.num_processes, "cells": cells, "checks": checks}


def main():
    torch.set_num_threads(1)
    found = results(sys.argv[1].split(","))
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT " + json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
