"""The logits of a set of images, gathered once: each image counts once on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lbaccel.data.images import ImageArray, ImageFiles, taken
from lbaccel.data.pipelines import evaluation_batches
from lbaccel.product.metrics import Floats, Ints
from lbaccel.recipe.evaluation import NotEvaluated, evaluate
from lbaccel.recipe.trained_model import TrainedModel

Images = ImageArray | ImageFiles
FLIP = "flip"
USUAL_BATCH = 64


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a network for a set of images, in the order of the set.

    Args:
        logits: [n, outputs]; with test-time augmentation the logarithms of mean probabilities.
        predicted: [n], the index of the largest, as the network's device finds it.
    """

    logits: Floats
    predicted: Ints


class KeptLogits(nn.Module):
    """A network that keeps what it gives: `evaluate` drives it as it drives a run's own.

    With `flip` it gives log((softmax(f(x)) + softmax(f(mirrored x))) / 2).
    """

    def __init__(self, network: nn.Module, *, flip: bool) -> None:
        super().__init__()
        self.network, self.flip = network, flip
        self.rows: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, outputs] of images [n, C, H, W]."""
        logits: Tensor = self.network(images)
        if self.flip:
            both = torch.stack([logits, self.network(images.flip(-1))]).double().log_softmax(-1)
            logits = both.logsumexp(0) - np.log(2)
        self.rows.append((logits.cpu(), logits.argmax(1).cpu()))
        return logits

    def keep(self, num_images: int) -> None:
        """Forget what came after so many images: they come again, in smaller batches."""
        kept, left = [], num_images
        for logits, predicted in self.rows:
            if left >= len(predicted):
                kept.append((logits, predicted))
                left -= len(predicted)
        self.rows = kept


def outputs_of(
    trained: TrainedModel, images: Images, accelerator: Accelerator, *, tta: str | None = None
) -> Outputs:
    """The outputs for all images, on every rank; the network ends on the accelerator's device.

    Batches are those of one process, handed to the ranks in turn: the outputs are the same to the
    bit on any number of ranks. Precision of the network and batch are the run's own.

    Raises:
        InputError: an image that can't be read.
        RunFailed: one image does not fit in memory.
    """
    size, world_size = batch_of(trained), accelerator.num_processes
    mine = _rows_of(len(images), size, rank=accelerator.process_index, world_size=world_size)
    own = taken(images, mine)
    dtype = next((p.dtype for p in trained.model.parameters()), torch.float32)
    recorder = KeptLogits(_placed(trained, accelerator), flip=tta == FLIP).eval()

    def batches(start: int, size: int) -> Any:
        recorder.keep(start)
        return evaluation_batches(
            own,
            preprocessing=dict(trained.preprocessing),
            batch_size=size,
            num_workers=trained.settings.data.workers,
            start=start,
        )

    try:
        evaluate(recorder, batches, accelerator, dtype=dtype, batch_size=size)
    except NotEvaluated as failed:
        raise failed.error from None
    logits, predicted = _joined(recorder, num_outputs=len(trained.classes))
    if world_size > 1:
        logits, predicted = _gathered(accelerator, logits, predicted, len(images), size)
    return Outputs(logits.double().numpy(), predicted.numpy())


def batch_of(trained: TrainedModel) -> int:
    """Images a forward: as the run's own evaluations had."""
    planned = trained.plan.get("micro_batch_size")
    size = trained.settings.batch.val_batch_size or planned
    return size if isinstance(size, int) and size > 0 else USUAL_BATCH


def _placed(trained: TrainedModel, accelerator: Accelerator) -> nn.Module:
    model = trained.model.to(accelerator.device)
    if trained.plan.get("memory_format") == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _rows_of(n: int, batch: int, *, rank: int, world_size: int) -> list[int]:
    """The images of this rank: of the batches of one process every `world_size`-th."""
    return [row for row in range(n) if row // batch % world_size == rank]


def _joined(recorder: KeptLogits, *, num_outputs: int) -> tuple[Tensor, Tensor]:
    logits = [torch.empty(0, num_outputs), *(found for found, _ in recorder.rows)]
    predicted = [torch.empty(0, dtype=torch.long), *(found for _, found in recorder.rows)]
    dtype = logits[-1].dtype
    return torch.cat([part.to(dtype) for part in logits]), torch.cat(predicted)


def _gathered(
    accelerator: Accelerator, logits: Tensor, predicted: Tensor, n: int, batch: int
) -> tuple[Tensor, Tensor]:
    """The rows of all ranks in the order of the set; ranks have different numbers of them."""
    shares = [
        _rows_of(n, batch, rank=rank, world_size=accelerator.num_processes)
        for rank in range(accelerator.num_processes)
    ]
    most = max(map(len, shares))
    padded = torch.full((most, logits.shape[1] + 1), torch.nan, dtype=torch.float64)
    padded[: len(logits), :-1] = logits.double()
    padded[: len(logits), -1] = predicted.double()
    everything: Any = accelerator.gather(padded.to(accelerator.device))
    everything = everything.cpu().view(len(shares), most, -1)
    whole = torch.empty(n, logits.shape[1] + 1, dtype=torch.float64)
    for rows, part in zip(shares, everything, strict=True):
        whole[torch.tensor(rows, dtype=torch.long)] = part[: len(rows)]  # the rest is padding
    return whole[:, :-1], whole[:, -1].long()
