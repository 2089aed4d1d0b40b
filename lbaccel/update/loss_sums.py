"""The losses and weights of one rank's micro-batches: each one's share, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.update.loss_parts import SampleSums, parts_of
from lbaccel.update.weightless import Weightless


@dataclass(frozen=True)
class Sums:
    """The sums over one rank's micro-batches; tensors stay on the device until the commit."""

    loss: Tensor  # float64 [], sum of w_i l_i
    weight: Tensor  # float64 [], sum of w_i
    own_weights: bool  # the loss function returned weights
    samples: SampleSums = field(default_factory=SampleSums)  # what it counted beside its loss


class LossSums:
    """Takes the results of the loss function in turn; no host synchronisation.

    Args:
        num_samples: samples of the update over all ranks (B).
        weightless: the hooks of this attempt, which learn each weight.
    """

    def __init__(self, num_samples: int, weightless: Weightless) -> None:
        self._num_samples, self._weightless = num_samples, weightless
        self._loss: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self._weighs: bool | None = None
        self._samples, self._device = SampleSums(), torch.device("cpu")

    def take(
        self, out: Any, micro_batch: MicroBatch, backward: Callable[[Tensor], object]
    ) -> Tensor | float:
        """Run the backward pass of a micro-batch's share w_i l_i / B, and add its loss and weight.

        Args:
            out: what the loss function returned.
            micro_batch: a filler has weight 0.
            backward: told the share [].

        Returns:
            The weight w_i.

        Raises:
            InputError: the loss is no scalar that requires grad, or only some micro-batches weigh.
        """
        loss, weight, sums = parts_of(out)
        self._samples.add(sums, counts=not micro_batch.is_filler)
        check_loss(loss)
        self._device = loss.device
        if self._weighs is None:
            self._weighs = weight is not None
        elif self._weighs != (weight is not None):
            raise _some_weigh()
        if micro_batch.is_filler:
            weight = 0.0
        elif weight is None:
            weight = float(micro_batch.num_samples)
        elif isinstance(weight, Tensor):
            weight = weight.detach().double()  # int64 / int would be float32
        share = weight / self._num_samples
        self._weightless.expect(weight)
        backward(loss * (share.to(loss.dtype) if isinstance(share, Tensor) else share))
        if not micro_batch.is_filler:
            self._loss = self._weightless.added(self._loss, loss, weight)
            self._weight = self._weight + weight
        return weight

    def so_far(self) -> Sums:
        """The sums, on the device of the losses."""
        as_double = {"dtype": torch.float64, "device": self._device}
        return Sums(
            torch.as_tensor(self._loss, **as_double),
            torch.as_tensor(self._weight, **as_double),
            bool(self._weighs),
            self._samples,
        )


def _some_weigh() -> InputError:
    """Weights of some micro-batches, and not of the others."""
    return InputError(
        "the loss function returned a weight for some micro-batches of this update "
        "and none for others. Return (loss, weight) always or never."
    )


def check_loss(loss: Any) -> None:
    """Stop at what is no mean loss with a gradient.

    Raises:
        InputError: its shape.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        grad = " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise InputError(
            f"the loss function returned {shape}{grad}: it must return the mean loss of the "
            "micro-batch, a scalar that requires grad (reduction='mean'), or (loss, weight)."
        )
