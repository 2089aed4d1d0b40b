"""Top-1 accuracy and loss of a model over a validation set, summed over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.runs.ranks import on_each_rank
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

    Raises:
        InputError: an image of some rank can't be read; on every rank.
    """
    was_training = model.training
    model.eval()
    raised: Exception | None = None
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    try:
        for images, labels in batches:
            images = images.to(accelerator.device, dtype, non_blocking=True)
            labels = labels.to(accelerator.device, non_blocking=True)
            with autocast(accelerator):
                logits: Tensor = model(images)
            logits = logits.double() if dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            hits = (logits.argmax(1) == labels).sum().double()
            count = torch.full_like(loss, len(labels))
            sums += torch.stack([loss, hits, count, torch.zeros_like(loss)])
    except Exception as error:  # the other ranks wait for this one's sums
        raised = error
        sums[3] += 1
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
    loss_sum, num_hits, num_images, num_failed = sums.tolist()
    if num_failed:
        on_each_rank(accelerator, lambda: _raise(raised))
    return {"loss": loss_sum / num_images, "top1": 100 * num_hits / num_images}


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
