"""Run by torchrun: two updates of a large batch under DeepSpeed ZeRO, on small images.

Prints one JSON line on rank 0: {"world_size", "runs": [...], "cells": {name: error}}.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch.nn import functional as F
from zero_ranks import Case, cut, errors, make_accelerator, make_model, make_optimizer, whole_state

from lbaccel import BatchPlan, LargeBatch
from lbaccel.data.loader import Update

MICRO, NORM, NUM_UPDATES = 512, 32, 2


def make_samples(number, count):
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (count,), generator=generator)


def reference(count):
    """(loss, norm, state) of each update: one process, float64, one ghost batch after the other."""
    model = make_model(torch.float64)
    optimizer = make_optimizer(model, "sgd")
    history = []
    for number in range(NUM_UPDATES):
        images, labels = make_samples(number, count)
        optimizer.zero_grad()
        loss = 0.0
        for rows in torch.arange(count).split(NORM):
            logits = model(images[rows].double())
            part = F.cross_entropy(logits, labels[rows], reduction="sum") / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        history.append((loss, float(norm), state))
    return history


def run(stage, count, *, compare):
    """What the run counted, over both ranks, and its error against `reference`."""
    accelerator = make_accelerator(Case(stage))
    plan = BatchPlan(
        global_batch_size=count,
        micro_batch_size=MICRO,
        world_size=accelerator.num_processes,
        norm_batch_size=NORM,
    )
    model = make_model(torch.float32)
    large_batch = LargeBatch(accelerator, plan)
    engine, _, _ = large_batch.prepare(model, make_optimizer(model, "sgd"), [])
    before = {k: v.clone() for k, v in whole_state(large_batch).items()}
    seen = []

    def loss_fn(model, micro_batch):
        positions, images, labels = micro_batch
        if torch.is_grad_enabled():  # not the samples on which masks are learned
            seen.append(positions)
        return F.cross_entropy(model(images), labels)

    worst, steps = 0.0, 0
    truth = reference(count) if compare else [None] * NUM_UPDATES
    for number, true in enumerate(truth):
        images, labels = make_samples(number, count)
        positions = torch.arange(number * count, (number + 1) * count)
        micro_batches = [
            (m, (positions[m.start : m.start + m.num_samples], *cut(m, images, labels)))
            for m in plan.partition(accelerator.process_index)
        ]
        steps = len(micro_batches)
        result = large_batch.update(Update(number, count, micro_batches), loss_fn)
        assert result.applied and result.num_samples == count
        if true is not None:
            found = (result.loss, result.grad_norm, whole_state(large_batch))
            worst = max(worst, errors(found, true))
    now = whole_state(large_batch)
    moved = all(not torch.equal(now[k], v) for k, v in before.items() if v.is_floating_point())
    everyone = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(everyone, torch.cat(seen))
    counted = {
        "stage": engine.zero_optimization_stage(),
        "asked": count,
        "plan": large_batch.plan.global_batch_size,
        "engine": engine.train_batch_size(),
        "samples_seen": large_batch.samples_seen,
        "num_updates": large_batch.num_updates,
        "micro_steps": steps,
        "different": torch.cat(everyone).unique().numel(),
        "of_each_rank": [len(one) for one in everyone],
        "moved": moved,
    }
    engine.destroy()
    return counted, worst


def main():
    torch.set_num_threads(1)
    logger.setLevel("ERROR")
    sizes = [int(size) for size in sys.argv[1].split(",")]
    runs, cells = [], {}
    for stage, count in [*((2, count) for count in sizes), (3, sizes[0])]:
        compare = count == sizes[0]
        counted, error = run(stage, count, compare=compare)
        runs.append(counted)
        if compare:
            cells[f"ZeRO-{stage}, {count}"] = error
    if dist.get_rank() == 0:
        found = {"world_size": dist.get_world_size(), "runs": runs, "cells": cells}
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
