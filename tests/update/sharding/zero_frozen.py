"""Updates under ZeRO with frozen parameters and recompute, in each rank of a fork."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F
from zero_ranks import (
    SIZES,
    Case,
    errors,
    make_accelerator,
    make_model,
    make_samples,
    mean_loss,
    whole_state,
)
from zero_ranks import updates as updates_of

from lbaccel import BatchPlan, LargeBatch, apply_activation_checkpointing
from lbaccel.optim.optimizers import create_optimizer
from lbaccel.optim.trained import train_only


def optimizer_of(model):
    return create_optimizer(model, "momentum", lr=0.1, weight_decay=0.01)


def reference(method):
    """(loss, norm, state) of each update in plain torch and float64, BatchNorm frozen."""
    model = make_model(torch.float64)
    train_only(model, method)
    optimizer, history = optimizer_of(model), []
    model.eval()
    for number in range(len(SIZES)):
        images, labels = make_samples(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.double()), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        history.append((loss.item(), float(norm), state))
    return history


def run(stage, method):
    """The largest error of any update, and the frozen parameters left gathered after each."""
    accelerator = make_accelerator(Case(stage))
    model = make_model(torch.float32)
    train_only(model, method)
    apply_activation_checkpointing(model)
    plan = BatchPlan(
        global_batch_size=SIZES[0],
        micro_batch_size=6,
        world_size=accelerator.num_processes,
        norm_batch_size="frozen",
    )
    large_batch = LargeBatch(accelerator, plan)
    engine, _, loader = large_batch.prepare(model, optimizer_of(model), updates_of(accelerator))
    worst, gathered = 0.0, []
    for update, truth in zip(loader, reference(method), strict=True):
        result = large_batch.update(update, mean_loss)
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        gathered.append(
            [n for n, p in frozen.items() if stage == 3 and p.ds_status.name != "NOT_AVAILABLE"]
        )
        found = (result.loss, result.grad_norm, whole_state(large_batch))
        worst = max(worst, errors(found, truth))
    engine.destroy()
    assert dist.get_world_size() == accelerator.num_processes
    return worst, gathered
