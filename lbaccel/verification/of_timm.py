"""A network of timm's that `lbaccel verify` checks: built where it fits, and random samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.errors import InputError, RunFailed
from lbaccel.models import create_backbone
from lbaccel.network_arguments import SMALL_IMAGE, as_words
from lbaccel.update.memory.budget import default_budget
from lbaccel.update.memory.oom import is_out_of_memory

NUM_CLASSES = 10
NOISE = 0.05
BYTES_PER_VALUE = 64  # of an image, at the least: in float32 and float64, and a few feature maps
BYTES_PER_WEIGHT = 24  # in float32, in float64, and its gradient
BYTES_PER_PROCESS = 2**28
UNCHECKED_CLASSES = 10_000
UNCHECKED_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class TimmNetwork:
    """A network by its name, its weights, and what is not to be timm's default.

    Args:
        name: of timm's.
        pretrained: with timm's weights.
        checkpoint: a file of weights.
        img_size: pixels a side; None is the smallest that the network takes.
        num_classes: None is NUM_CLASSES, or the number that loaded weights have.
        drop_path, drop_rate: probabilities.
        arguments: of the network itself.
        seed: of fresh weights, and of the noise on them.
    """

    name: str
    pretrained: bool = False
    checkpoint: Path | None = None
    img_size: int | None = None
    num_classes: int | None = None
    drop_path: float = 0.0
    drop_rate: float = 0.0
    arguments: Mapping[str, Any] | None = None
    seed: int = 0

    @property
    def origin(self) -> str:
        """Where the weights are from, and what the network drops, in words."""
        found = "fresh weights and noise"
        if self.checkpoint is not None:
            found = f"weights of {self.checkpoint}"
        elif self.pretrained:
            found = "pretrained weights"
        drops = [f"drop-path {self.drop_path:g}"] * bool(self.drop_path)
        drops += [f"drop-rate {self.drop_rate:g}"] * bool(self.drop_rate)
        return ", ".join([found, *drops, *as_words(self.arguments or {})])

    def build(self) -> tuple[nn.Module, int, int]:
        """The model, its image size and its number of classes; fresh weights get some noise.

        A gain of 0, as timm starts some, would hide gradients: hence the noise.

        Raises:
            InputError: an unknown model, or sizes that it can't take.
            RunFailed: pretrained weights that can't be had, or no memory is left.
        """
        torch.manual_seed(self.seed)
        model, size, num_classes = self._at_a_size()
        if not self.pretrained and self.checkpoint is None:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += NOISE * torch.randn(parameter.shape, generator=generator)
        return model, size, num_classes

    def _at_a_size(self) -> tuple[nn.Module, int, int]:
        known = timm.is_model(self.name.split(".")[0])
        config = timm.get_pretrained_cfg(self.name) if known else None
        own_classes = getattr(config, "num_classes", NUM_CLASSES)
        loaded = self.pretrained or self.checkpoint is not None
        num_classes = self.num_classes or (own_classes if loaded else NUM_CLASSES)
        own_size = config.input_size[-1] if config is not None else SMALL_IMAGE
        sizes = [self.img_size] if self.img_size else sorted({min(SMALL_IMAGE, own_size), own_size})
        for size in sizes:
            try:
                model = create_backbone(
                    self.name,
                    num_classes=num_classes,
                    img_size=size,
                    pretrained=self.pretrained,
                    checkpoint=self.checkpoint,
                    drop_rate=self.drop_rate,
                    drop_path=self.drop_path,
                    arguments=self.arguments,
                )
                _try_image(model, size)
            except RunFailed:
                raise
            except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
                if is_out_of_memory(error):
                    raise RunFailed(
                        f"no memory was left for {self.name} with {num_classes:,} classes at "
                        f"{size} px. Use a smaller --num-classes or --img-size."
                    ) from error
                if isinstance(error, InputError) and (size == sizes[-1] or not known):
                    raise
                if size == sizes[-1]:
                    reason = " ".join(str(error).split())[:200].rstrip(".")
                    raise InputError(
                        f"{self.name} can't take images of {size} px: {reason}. Give another "
                        "--img-size."
                    ) from error
            else:
                return model, size, num_classes
        raise AssertionError("the last size returns or raises")

    def check_memory(self, num_samples: int, size: int, *, processes: int, smaller: str) -> None:
        """Stop at images, outputs and processes that this machine can't hold.

        Args:
            num_samples: of the update.
            size: of an image, pixels a side.
            processes: ranks, each with a network of its own.
            smaller: the flags whose values may be smaller.

        Raises:
            InputError: what they need at the least, and what is free.
        """
        needed = num_samples * 3 * size**2 * BYTES_PER_VALUE + processes * BYTES_PER_PROCESS
        if (self.num_classes or 0) > UNCHECKED_CLASSES:
            with torch.device("meta"):
                model = create_backbone(
                    self.name,
                    num_classes=self.num_classes or NUM_CLASSES,
                    img_size=self.img_size,
                    arguments=self.arguments,
                )
            needed += sum(p.numel() for p in model.parameters()) * BYTES_PER_WEIGHT * processes
        if needed <= UNCHECKED_BYTES:
            return
        free = default_budget(torch.device("cpu"))
        if needed > free:
            raise InputError(
                f"{num_samples:,} images of {size} px and {self.name} on {processes:,} "
                f"rank{'s' * (processes > 1)} take at least {needed / 2**30:,.1f} GiB, and "
                f"{free / 2**30:,.1f} GiB are free here. Use a smaller {smaller}, --num-classes or "
                "--img-size."
            )


def _try_image(model: nn.Module, size: int) -> None:
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    model.train()


def random_samples(count: int, size: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of normal values (count, 3, size, size) and labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (count,), generator=generator)


def cross_entropy(model: Any, micro_batch: Any) -> Tensor:
    """The mean loss of a micro-batch of `random_samples`."""
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)
