"""Top-1 accuracy and loss of a model over a validation set, summed over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.update.sharding.precision import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Any], accelerator: Accelerator, *, dtype: torch.dtype
) -> dict[str, float]:
    """Mean cross-entropy and top-1 (%) over all samples of all ranks; eval mode, then as before.

    Args:
        model: unwrapped, so that ranks may have different numbers of batches.
        batches: (images [n, C, H, W], labels [n]) of this rank.
        dtype: of the images.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    try:
        for images, labels in batches:
            images = images.to(accelerator.device, dtype, non_blocking=True)
            labels = labels.to(accelerator.device, non_blocking=True)
            with autocast(accelerator):
                logits: Tensor = model(images)
            logits = logits.double() if dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            hits = (logits.argmax(1) == labels).sum().double()
            sums += torch.stack([loss, hits, torch.full_like(loss, len(labels))])
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
    loss_sum, num_hits, count = sums.tolist()
    return {"loss": loss_sum / count, "top1": 100 * num_hits / count}
