"""Run by torchrun: the noise scale under DeepSpeed ZeRO against explicit gradients in float64.

Prints one JSON line on rank 0: {"world_size", "cells": {name: error}, "refused": {name: message}}.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch.nn import functional as F
from zero_ranks import (
    CLASS_WEIGHTS,
    CLIP,
    SIZES,
    Case,
    cut,
    make_accelerator,
    make_model,
    make_optimizer,
    make_plan,
    make_samples,
    mean_loss,
    weighted_loss,
)

from lbaccel import InputError, LargeBatch, NoiseScale
from lbaccel.data.loader import Update
from lbaccel.noise.arithmetic import estimate

CASES = {
    **{f"ZeRO-{s}, clipped": Case(s, clip=CLIP) for s in range(3)},
    "ZeRO-2, weights of its own": Case(2, weights=True),
    "ZeRO-2, SGD offloaded": Case(2, zero={"offload_optimizer": {"device": "cpu"}}),
}


def truth(plan, count, case):
    """`estimate` of the units of all ranks: plain torch, one ghost batch after the other."""
    model, (images, labels) = make_model(torch.float64), make_samples(0)
    weights = CLASS_WEIGHTS.double() if case.weights else torch.ones(5, dtype=torch.float64)
    masses, gradients = [], []
    for part in (m for rank in range(plan.world_size) for m in plan.partition(rank, count)):
        if part.is_filler:
            continue
        x, y = cut(part, images.double(), labels)
        groups = zip(x.split(part.group_sizes), y.split(part.group_sizes), strict=True)
        loss = sum(F.cross_entropy(model(a), b, weights, reduction="sum") for a, b in groups)
        masses.append(weights[y].sum())
        found = torch.autograd.grad(loss / masses[-1], list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    sizes = torch.stack(masses) * count / sum(masses)
    units = torch.stack(gradients)
    update = (sizes[:, None] * units).sum(0) / count
    return estimate(
        float((sizes * units.square().sum(1)).sum()),
        float(update.square().sum()),
        num_samples=count,
        num_units=len(units),
    )


def prepared(case, noise):
    accelerator = make_accelerator(case)
    plan = make_plan(accelerator)
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=case.clip, noise_scale=noise)
    model = make_model(torch.float32)
    engine, _, _ = large_batch.prepare(model, make_optimizer(model, case.optimizer), ())
    return large_batch, plan, accelerator.process_index, engine


def cell(case):
    noise = NoiseScale(half_life_samples=1000)
    large_batch, plan, rank, engine = prepared(case, noise)
    assert engine.zero_optimization_stage() == case.stage and plan.world_size == 2
    count = SIZES[0]
    parts = [(m, cut(m, *make_samples(0))) for m in plan.partition(rank, count)]
    large_batch.update(Update(0, count, parts), weighted_loss if case.weights else mean_loss)
    true = truth(plan, count, case)
    engine.destroy()
    pairs = zip((noise.average.scale_s, noise.average.grad_norm_sq), true, strict=True)
    worst = torch.tensor(max(abs(a / b - 1) for a, b in pairs), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def refused(case, **options):
    try:
        prepared(case, NoiseScale(half_life_samples=1000, **options))
    except InputError as error:
        return str(error)
    return "nothing"


def main():
    torch.set_num_threads(1)
    logger.setLevel("ERROR")
    cells = {name: cell(case) for name, case in CASES.items()}
    said = {
        "ZeRO-3": refused(Case(3)),
        "ZeRO-2, preconditioned": refused(Case(2, "adamw"), preconditioned=True),
    }
    if dist.get_rank() == 0:
        found = {"world_size": dist.get_world_size(), "cells": cells, "refused": said}
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
