"""A private copy of a network whose weights go from point to point; the network itself stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.landscape.directions import STATES, tensors_of
from lbaccel.landscape.folding import merge, pairs_of, take_out

Batch = tuple[Tensor, Tensor]
Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(outputs [n, ...], labels [n]) -> the sum of the losses, and the number of right predictions."""

# Of the largest logit: the change by merging BatchNorm. The rounding of a merged weight is the same
# for all images, so that the mean over them does not make it smaller; a surface is right to 1e-6.
SAME = 1e-6


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy in float64, and the number of labels that have the largest logit."""
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return loss, (logits.argmax(1) == labels).sum()


class MovedNetwork:
    """A copy of a network, in evaluation mode and without gradients, to be moved about.

    Convolutions run in `channels_last`, and BatchNorm is merged into the convolution before it
    where the outputs stay the same up to rounding (see `folding.py`); both are quicker, and neither
    changes the function.

    Args:
        model: is copied; half precision becomes float32.
        device: of the copy.
        images: a few of them [n, C, H, W]; None merges nothing.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, images: Tensor | None = None
    ) -> None:
        own = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        if not any(p.dtype == torch.float64 for p in own.parameters()):
            own = own.float()
        own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self._own = device, own
        self.dtype = next((p.dtype for p in own.parameters()), torch.float32)
        self._tensors = tensors_of(own, STATES)
        self._runs, self._pairs = own, []
        if images is not None:
            self._merge(images.to(device, self.dtype))

    @property
    def num_merged(self) -> int:
        """How many BatchNorm layers are merged into a convolution."""
        return len(self._pairs)

    def tensors(self, direction: str) -> dict[str, Tensor]:
        """A copy of the tensors that a direction moves, by name; see `tensors_of`."""
        return {name: t.detach().clone() for name, t in tensors_of(self._own, direction).items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take on these weights and buffers, by name; the others stay."""
        for name, value in values.items():
            self._tensors[name].copy_(value)
        for conv, source, norm in self._pairs:
            merge(conv, source.weight, source.bias, norm)

    @torch.inference_mode()
    def count(self, batches: Iterable[Batch], measure: Measure = cross_entropy) -> Tensor:
        """[3] in float64: the summed loss, the right predictions and the images of all batches."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels in batches:
            images = images.to(self.device, self.dtype)
            loss, hits = measure(self._runs(images), labels.to(self.device))
            count = torch.full_like(sums[0], len(labels))
            sums += torch.stack([loss.double(), hits.double(), count])
        return sums.cpu()

    @torch.no_grad()
    def _merge(self, images: Tensor) -> None:
        """Merge what follows a convolution, if the outputs say that nothing else reads it."""
        pairs = pairs_of(self._own, images)
        if not pairs:
            return
        convs = [self._own.get_submodule(pair.conv) for pair in pairs]
        apart = {id(t) for conv in convs for t in conv.parameters()}
        shared = (*self._own.parameters(), *self._own.buffers())
        # the merged network has modules of its own, and shares all tensors that are not merged
        merged: Any = copy.deepcopy(self._own, {id(t): t for t in shared if id(t) not in apart})
        triples = []
        for pair in pairs:
            take_out(merged, pair)
            triples.append(
                (
                    merged.get_submodule(pair.conv),
                    self._own.get_submodule(pair.conv),
                    self._own.get_submodule(pair.norm),
                )
            )
        for conv, source, norm in triples:
            merge(conv, source.weight, source.bias, norm)
        truth, found = self._own(images), merged(images)
        if truth.shape == found.shape and bool(
            (found - truth).abs().max() <= SAME * truth.abs().max()
        ):
            self._runs, self._pairs = merged, triples
