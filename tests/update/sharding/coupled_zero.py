"""A coupled loss under DeepSpeed ZeRO, in each rank of a fork."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.nn import functional as F
from zero_ranks import SIZES, Case, make_accelerator, make_model, make_samples
from zero_ranks import updates as updates_of

from lbaccel import BatchPlan, InputError, LargeBatch

UPDATES = 2


def embed(model, micro_batch):
    images, labels = micro_batch
    return F.normalize(model(images), dim=1), labels


def loss_fn(model, rows):
    """It reads a weight of the network itself, which every rank has."""
    z, labels = rows
    network = getattr(model, "module", model)
    same = (labels[:, None] == labels).to(z.dtype)
    logits = z @ z.T * network.state_dict(keep_vars=True)["fc.bias"].square().mean().add(2.0)
    return F.binary_cross_entropy_with_logits(logits, same)


def reference():
    """(loss, weights) of each update in plain torch and float64, BatchNorm frozen."""
    model = make_model(torch.float64).eval()
    optimizer, history = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for number in range(UPDATES):
        images, labels = make_samples(number)
        optimizer.zero_grad()
        loss = loss_fn(model, embed(model, (images.double(), labels)))
        loss.backward()
        optimizer.step()
        history.append((loss.item(), copy.deepcopy(model.state_dict())))
    return history


def run(stage):
    """The largest error of any update against one process, or the sentence that refuses it."""
    accelerator = make_accelerator(Case(stage))
    model = make_model(torch.float32)
    plan = BatchPlan(
        global_batch_size=SIZES[0],
        micro_batch_size=6,
        world_size=accelerator.num_processes,
        norm_batch_size="frozen",
    )
    large_batch = LargeBatch(accelerator, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    large_batch.prepare(model, optimizer, updates_of(accelerator))
    assert dist.get_world_size() == accelerator.num_processes == 2
    worst = 0.0
    for update, (true_loss, true_weights) in zip(
        updates_of(accelerator), reference(), strict=False
    ):
        try:
            result = large_batch.update(update, loss_fn, embed=embed)
        except InputError as error:
            return str(error)
        with large_batch.whole_model() as network:
            found = {k: v.double() for k, v in network.state_dict().items()}
        moved = [k for k, v in true_weights.items() if v.is_floating_point()]
        gap = sum(float((found[k] - true_weights[k]).square().sum()) for k in moved) ** 0.5
        size = sum(float(true_weights[k].square().sum()) for k in moved) ** 0.5
        worst = max(worst, gap / size, abs(result.loss - true_loss) / true_loss)
    return worst
