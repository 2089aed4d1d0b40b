"""The images of a landscape, made ready once and kept in memory where there is room for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lbaccel.data.images import ImageArray, ImageFiles, taken
from lbaccel.data.pipelines import evaluation_batches
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.randomness.keys import keyed_uniform
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.update.memory.budget import default_budget

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

SHARE = 0.5  # of the memory that is free now: the rest is for the network's activations
LITTLE = 2**30  # bytes, where nobody knows how many are free
PIXELS = 2**15  # of a batch on a CPU: its activations stay in the caches (measured)
LEAST, MOST = 4, 64  # images of a batch on a CPU
ON_DEVICE = 256  # of a batch elsewhere
_KIND = 0x1A2E  # of the draw of a subset


@dataclass(frozen=True, eq=False)
class Prepared:
    """Batches of normalised images [n, C, H, W] with their labels [n], the same at every pass.

    Args:
        batches: a pass over all of them.
        num_images: of one pass.
        in_memory: whether a pass decodes nothing.
    """

    batches: Batches
    num_images: int
    in_memory: bool


def subset(images: ImageArray | ImageFiles, num: int | None) -> ImageArray | ImageFiles:
    """The first `num` images of a fixed order; all of them where there are no more, or for None.

    The k-th of the n images of a class, in the order of a hash of their places, stands at about
    k / n in that order, so that any number of images has each class by its share; each number holds
    the smaller ones. It depends on no seed: two landscapes of one data set have the same images.
    """
    if num is None or num >= len(images):
        return images
    labels = np.asarray(images.labels)
    drawn = keyed_uniform(_KIND, np.arange(len(labels)))
    order = np.lexsort((drawn, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    within = np.arange(len(order)) - np.repeat(first, counts)
    place = (within + drawn[order]) / np.repeat(counts, counts)
    chosen = order[np.argsort(place, kind="stable")[:num]]
    return taken(images, sorted(chosen.tolist()))


def batch_size(img_size: int, device: torch.device) -> int:
    """Images a forward: by their size alone, so that a surface is the same on any number of ranks.

    >>> batch_size(32, torch.device("cpu")), batch_size(224, torch.device("cpu"))
    (32, 4)
    """
    if device.type != "cpu":
        return ON_DEVICE
    return min(MOST, max(LEAST, PIXELS // img_size**2))


def prepared(
    trained: TrainedModel,
    images: ImageArray | ImageFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
) -> Prepared:
    """The images as evaluation has them, without augmentation, on `device` where they fit there.

    Args:
        trained: whose preprocessing and loader workers are taken.
        images: all that a pass has.
        device: of the network; half of its free memory may hold images, shared by local ranks.
        dtype: of the network.
        size: images a batch; None is `batch_size`.

    Raises:
        InputError: an image that can't be read.
    """
    pixels = trained.preprocessing["img_size"]
    size = batch_size(pixels, device) if size is None else size

    def decoded() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, labels in evaluation_batches(
            images,
            preprocessing=dict(trained.preprocessing),
            batch_size=size,
            num_workers=trained.settings.data.workers,
        ):
            batch = batch.to(device, dtype)
            yield batch.contiguous(memory_format=torch.channels_last), labels.to(device)

    each = math.prod((trained.preprocessing["num_channels"], pixels, pixels)) * dtype.itemsize
    if each * len(images) > SHARE * _free(device):
        return Prepared(decoded, len(images), in_memory=False)
    kept = list(decoded())
    return Prepared(lambda: kept, len(images), in_memory=True)


def first_images(images: Prepared, most: int = LEAST) -> Tensor:
    """The first few images [n, C, H, W]."""
    return next(iter(images.batches()))[0][:most]


def _free(device: torch.device) -> int:
    """Bytes that this rank may count on; few where the system does not say."""
    try:
        return default_budget(device, ranks=local_world_size() if device.type == "cpu" else 1)
    except InputError:
        return LITTLE
