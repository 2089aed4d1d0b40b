"""The mean loss over images as a function of all parameters: value, gradient, Hessian products."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbaccel.errors import RunFailed
from lbaccel.landscape.images import Prepared
from lbaccel.landscape.network import Measure, cross_entropy
from lbaccel.stability.curvature import gradients
from lbaccel.update.memory.oom import is_out_of_memory


class MeanLoss:
    """L(w) = (1 / N) sum of the losses of N images, in a copy of a network in evaluation mode.

    w is the vector of all parameters, [n], in the order of `model.parameters()`; BatchNorm's
    statistics are constants. Images are gone through in the batches that they come in.

    Args:
        model: is copied; half precision becomes float32.
        images: all N.
        device: of the copy.
        measure: of outputs and labels.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Prepared,
        *,
        device: torch.device,
        measure: Measure = cross_entropy,
    ) -> None:
        own = copy.deepcopy(model).eval().to(device)
        if not any(p.dtype == torch.float64 for p in own.parameters()):
            own = own.float()
        self._model, self._images, self._measure = own, images, measure
        self._parameters = [p for p in own.parameters() if p.is_floating_point()]
        for p in self._parameters:
            p.requires_grad_()
        self.dtype, self.device = self._parameters[0].dtype, device
        self.num_parameters = sum(p.numel() for p in self._parameters)

    def weights(self) -> Tensor:
        """w, a copy [n]."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    @torch.no_grad()
    def put(self, w: Tensor) -> None:
        """Move the copy to these weights [n]."""
        for p, part in zip(self._parameters, self._parts(w), strict=True):
            p.copy_(part)

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L(w) and its gradient [n]."""
        total, gradient = (
            0.0,
            torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device),
        )
        for images, labels in self._batches():
            loss = self._loss(images, labels)
            total += loss.item()
            if loss.requires_grad:
                gradient += _flat(gradients(loss, self._parameters))
        return total, gradient

    def product(self, v: Tensor) -> Tensor:
        """H v [n], the gradient of (gradient . v) (Pearlmutter 1994).

        Raises:
            RunFailed: it is not finite, or memory ran out.
        """
        parts, found = self._parts(v), torch.zeros_like(v)
        # fused attention has no second derivative
        with _enough_memory(), sdpa_kernel(SDPBackend.MATH):
            for images, labels in self._batches():
                loss = self._loss(images, labels)
                if not loss.requires_grad:
                    continue
                first = gradients(loss, self._parameters, create_graph=True)
                terms = [(g * part).sum() for g, part in zip(first, parts, strict=True)]
                along = torch.stack(terms).sum()
                if along.requires_grad:  # else the loss is linear in the weights
                    found += _flat(gradients(along, self._parameters))
        if not bool(torch.isfinite(found).all()):
            raise RunFailed(
                "the loss's curvature is not finite at these weights, so their sharpness is not "
                "known. Take a checkpoint whose loss is finite."
            )
        return found

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """This batch's share of the mean loss."""
        return self._measure(self._model(images), labels)[0] / self._images.num_images

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._images.batches():
            yield images.to(self.device, self.dtype), labels.to(self.device)

    def _parts(self, v: Tensor) -> list[Tensor]:
        pieces = v.split([p.numel() for p in self._parameters])
        return [
            piece.to(p).view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)
        ]


@contextmanager
def _enough_memory() -> Iterator[None]:
    """A block in which a lack of memory is a RunFailed."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            "memory ran out in a derivative of the loss. Give this process more memory, or take a "
            "run with smaller images."
        ) from error


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
