"""Top-1 accuracy and loss of a model over a validation set, summed over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.pipelines import EvaluationBatches
from lbaccel.data.pixel_cache import CachePart
from lbaccel.errors import RunFailed, told
from lbaccel.launch import rank
from lbaccel.recipe.unforeseen import first_line, in_a_sentence
from lbaccel.runs.ranks import on_each_rank
from lbaccel.update.compiled import as_written
from lbaccel.update.memory.oom import is_out_of_memory, let_go
from lbaccel.update.sharding.precision import autocast

logger = logging.getLogger("lbaccel")

Batches = Callable[[int, int], Iterable[Any]]


class NotEvaluated(Exception):
    """Some rank failed, and all ranks know it: each can still save, and then raise `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Room:
    """The largest batch that an evaluation of this rank had room for; None: no lack so far."""

    most: int | None = None

    def fit(self, size: int) -> int:
        """`size`, or less where it did not fit before."""
        return size if self.most is None else min(size, self.most)


def validation_batches(
    images: ImageArray | ImageFiles,
    accelerator: Accelerator,
    *,
    preprocessing: dict[str, Any],
    workers: int,
    cache: CachePart | None = None,
) -> EvaluationBatches:
    """The images of a validation set as `evaluate` takes them, of which this rank has its share."""
    return EvaluationBatches(
        images,
        preprocessing=preprocessing,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=workers,
        cache=cache,
    )


def evaluate(
    model: nn.Module,
    batches: Batches,
    accelerator: Accelerator,
    *,
    dtype: torch.dtype,
    batch_size: int,
    room: Room | None = None,
    top5: bool = False,
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (%) over all samples of all ranks; eval mode inside.

    Where memory runs out, the rank goes on in batches of half the size from the first sample that
    is not counted yet. Losses are computed and added up in float64, so that the size of the
    batches changes them by the rounding of the forward pass alone.

    Args:
        model: unwrapped, so that ranks may have different numbers of batches.
        batches: (start, size) -> (images [n, C, H, W], labels [n]) of this rank, n <= size, from
            its sample `start` on.
        dtype: of the images.
        batch_size: samples a forward.
        room: what fitted in evaluations before; it is kept up to date.
        top5: count the labels among the five largest logits too, of at least five classes.

    Raises:
        NotEvaluated: on every rank. Its `error` is an InputError where an image of some rank can't
            be read, and a RunFailed where one sample does not fit in memory.
    """
    was_training = model.training
    model.eval()
    raised: BaseException | None = None
    device = accelerator.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    try:
        with as_written(model):
            _add_up(model, batches, accelerator, sums, dtype, batch_size, room or Room(), top5)
    except Exception as error:  # the other ranks wait for this one's sums
        raised = in_a_sentence(told(error))
        sums[4] += 1
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
    loss_sum, num_hits, num_among, num_images, num_failed = sums.tolist()
    if num_failed:
        try:
            on_each_rank(accelerator, lambda: _raise(raised))
        except Exception as error:
            raise NotEvaluated(error) from error
    found = {"loss": loss_sum / num_images, "top1": 100 * num_hits / num_images}
    return found | ({"top5": 100 * num_among / num_images} if top5 else {})


def _add_up(
    model: nn.Module,
    batches: Batches,
    accelerator: Accelerator,
    sums: Tensor,
    dtype: torch.dtype,
    batch_size: int,
    room: Room,
    top5: bool,
) -> None:
    """Add this rank's loss, hits and number of samples to `sums`, in batches that fit."""
    done = [0]
    while True:
        size = room.fit(batch_size)
        try:
            _count(model, batches(done[0], size), accelerator, sums, dtype, done, top5)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise _nothing_fits(error) from error
            let_go(error, accelerator.device)
        room.most = size // 2
        where = f"rank {rank()}: " if accelerator.num_processes > 1 else ""
        logger.warning(
            f"{where}out of memory in the evaluation at batch {size}: it goes on with {size // 2}. "
            "The result does not depend on it."
        )


@torch.no_grad()
def _count(
    model: nn.Module,
    batches: Iterable[Any],
    accelerator: Accelerator,
    sums: Tensor,
    dtype: torch.dtype,
    done: list[int],
    top5: bool,
) -> None:
    """One pass over the batches; `sums` and the samples `done` change together, a batch a time."""
    device = accelerator.device
    for images, labels in batches:
        images = images.to(device, dtype, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(accelerator):
            logits: Tensor = model(images)
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        hits = (logits.argmax(1) == labels).sum().double()
        count = torch.full_like(loss, len(labels))
        among = torch.zeros_like(loss)
        if top5:
            among += (logits.topk(5, 1).indices == labels[:, None]).any(1).sum()
        sums += torch.stack([loss, hits, among, count, torch.zeros_like(loss)])
        done[0] += len(labels)


def _nothing_fits(error: Exception) -> RunFailed:
    return RunFailed(
        f"memory ran out in the evaluation at a batch of one sample ({first_line(error)}). Give "
        "the run more memory (--memory), smaller images (--img-size), or --precision bf16."
    )


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error
