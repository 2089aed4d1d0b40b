"""The network that a plan is made for: a model by name or as it is, data, loss and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError, check_whole
from lbaccel.models import create_backbone
from lbaccel.optim.optimizers import create_optimizer, has_fused_step
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.update import MakeBatch, Network, Precision, image_batch
from lbaccel.update.accumulation import LossFn
from lbaccel.update.embeddings import Embed


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The training that `plan` is asked about: a model by name, or a module with its own data."""

    model: str | nn.Module
    img_size: int | None
    num_classes: int
    arguments: Mapping[str, Any] | None = None
    optimizer: str | torch.optim.Optimizer
    make_batch: MakeBatch | None
    loss_fn: LossFn
    embed: Embed | None = None
    teacher: nn.Module | None = None
    clips: bool
    precision: Precision

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    @property
    def optimizer_name(self) -> str:
        """As asked for, or its class."""
        chosen = self.optimizer
        return chosen if isinstance(chosen, str) else type(chosen).__name__

    def built(self) -> nn.Module:
        """The model; one by name is built, on torch's default device."""
        if not isinstance(self.model, str):
            return self.model
        return create_backbone(
            self.model,
            num_classes=self.num_classes,
            img_size=self.img_size,
            arguments=self.arguments,
        )


def network_of(trained: Trained, device: Device) -> Network:
    """The network to trace; a model by name is built without memory.

    Raises:
        InputError: no such model or optimizer, or images whose size nobody says.
    """
    if trained.img_size is not None:
        check_whole("img_size", trained.img_size)
    with torch.device("meta"):
        model = trained.built()
    make_batch, optimizer = trained.make_batch, trained.optimizer
    if make_batch is None:
        make_batch = image_batch(*image_shape(model, trained.img_size))
    if isinstance(optimizer, str):
        fused = has_fused_step(optimizer, device_type=device.kind, precision=trained.precision)
        optimizer = create_optimizer(model, optimizer, lr=0.1, weight_decay=1e-4, fused=fused)
    return Network(
        model=model,
        make_batch=make_batch,
        loss_fn=trained.loss_fn,
        embed=trained.embed,
        teacher=trained.teacher,
        optimizer=optimizer,
        clips=trained.clips,
    )


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
