"""One update through lbaccel's public API, for tests: returns loss, gradients and buffers."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing


def cross_entropy(model: Any, micro_batch: Any) -> torch.Tensor:
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)


class KeepGradients(torch.optim.SGD):
    """Plain SGD that keeps a copy of the gradient it was given."""

    seen: dict[int, torch.Tensor]

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.seen = {i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}
        return super().step(closure)


def one_update(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    micro_batch_size: int,
    norm_batch_size: Any = None,
    checkpointing: bool = False,
    loss_fn: Any = cross_entropy,
    accelerator: Accelerator | None = None,
    clip_grad_norm: float | None = None,
    bn_statistics: Any = "per_ghost",
) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One full-batch update of `model` over all samples, at learning rate 0."""
    accelerator = accelerator or Accelerator(cpu=True)
    if checkpointing:
        apply_activation_checkpointing(model)
    names = [n for n, _ in model.named_parameters()]
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    plan = BatchPlan(
        global_batch_size=len(images),
        micro_batch_size=micro_batch_size,
        world_size=accelerator.num_processes,
        norm_batch_size=norm_batch_size,
    )
    large_batch = LargeBatch(
        accelerator, plan, clip_grad_norm=clip_grad_norm, bn_statistics=bn_statistics
    )
    loader = UpdateLoader(TensorDataset(images, labels), plan, rank=accelerator.process_index)
    bare = model
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    (update,) = loader
    result = large_batch.update(update, loss_fn)
    gradients = {names[i]: g for i, g in optimizer.optimizer.seen.items()}
    return result, gradients, dict(bare.named_buffers())


def visiting_order(count: int, seed: int = 0) -> Any:
    """The order in which epoch 0 of the loader visits `count` samples."""
    from lbaccel.data.order import epoch_order

    return epoch_order(seed, 0, count).copy()
