"""The network that a plan is made for: a model by name or as it is, data, loss and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError, check_whole
from lbaccel.models import create_backbone
from lbaccel.optim.optimizers import create_optimizer, has_fused_step
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.update import MakeBatch, Network, Precision, image_batch
from lbaccel.update.accumulation import LossFn


def network_of(
    model: str | nn.Module,
    *,
    img_size: int | None,
    num_classes: int,
    optimizer: Any,
    make_batch: MakeBatch | None,
    loss_fn: LossFn,
    clips: bool,
    device: Device,
    precision: Precision,
) -> tuple[Network, str]:
    """The network to trace, and its name; a model by name is built without memory."""
    if img_size is not None:
        check_whole("img_size", img_size)
    if isinstance(model, str):
        name = model
        with torch.device("meta"):
            model = create_backbone(name, num_classes=num_classes, img_size=img_size)
    else:
        name = type(model).__name__
    if make_batch is None:
        make_batch = image_batch(*image_shape(model, img_size))
    if isinstance(optimizer, str):
        fused = has_fused_step(optimizer, device_type=device.kind, precision=precision)
        optimizer = create_optimizer(model, optimizer, lr=0.1, weight_decay=1e-4, fused=fused)
    network = Network(
        model=model, make_batch=make_batch, loss_fn=loss_fn, optimizer=optimizer, clips=clips
    )
    return network, name


def image_shape(model: nn.Module, img_size: int | None) -> tuple[int, int]:
    """Channels and pixels a side of the images that a model takes.

    Raises:
        InputError: neither `img_size` nor the model says it.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, *sides = config.get("input_size") or (3, img_size)
    size = img_size or sides[-1]
    if size is None:
        name = type(model).__name__
        raise InputError(f"{name} does not say which images it takes. Give img_size=224.")
    return channels, size


def random_images(num_channels: int, img_size: int) -> MakeBatch:
    """As `image_batch`, with values: a kernel on zeros may be faster than one on images."""

    def make(num_samples: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(num_samples, num_channels, img_size, img_size)
        return images, torch.zeros(num_samples, dtype=torch.long)

    return make
