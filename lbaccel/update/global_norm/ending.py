"""The loss of each micro-batch at the last level, and what is said of the passes that led there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lbaccel.batch.plan import MicroBatch
from lbaccel.update.accumulation import Sums, check_loss, some_weigh
from lbaccel.update.global_norm.replay import Values
from lbaccel.update.global_norm.schedule import Schedule
from lbaccel.update.global_norm.tape import Tape
from lbaccel.update.loss_parts import SampleSums, parts_of
from lbaccel.update.weightless import Weightless


@dataclass(frozen=True)
class Passes:
    """How an update over BatchNorm of the whole batch ran on this rank.

    With L levels it takes L passes forward and L + 1 backward, each over all samples: in all two
    forwards and one backward of an ordinary update, and `again` of a forward more.
    """

    layers: int  # BatchNorm layers that ran
    levels: int  # of them: layers that don't depend on each other share one
    kept: int  # levels whose values stay on the host from the forward passes on
    again: float  # work of the forward that runs once more, over that of one forward
    host_bytes: int  # most that the schedule may take on the host
    peak_bytes: int = 0  # most that it took

    @classmethod
    def of(cls, tape: Tape, schedule: Schedule, peak_bytes: int = 0) -> Passes:
        """Of a tape and its schedule, and of an attempt that has ended with this peak."""
        return cls(
            layers=sum(call.layer is not None for call in tape.calls),
            levels=tape.depth,
            kept=len(schedule.kept),
            again=schedule.work,
            host_bytes=schedule.host_bytes,
            peak_bytes=peak_bytes,
        )

    @property
    def times_as_long(self) -> float:
        """As an ordinary update, where a backward takes twice a forward: 4 / 3 and more."""
        return 1 + (1 + self.again) / 3

    def __str__(self) -> str:
        again = f", {self.again:.2f} of a forward run again" if self.again else ""
        return (
            f"BatchNorm over the whole batch: {self.layers} layers in {self.levels} levels, so "
            f"{self.levels} passes forward and {self.levels + 1} backward; at most "
            f"{self.host_bytes / 2**30:.3g} GiB on the host{again}"
        )


class Ending:
    """The result of the loss function for each micro-batch, and its backward pass."""

    def __init__(
        self, num_samples: int, backward: Callable[[Tensor], object], weightless: Weightless
    ) -> None:
        self._num_samples, self._backward, self._weightless = num_samples, backward, weightless
        self._loss: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self._weighs: bool | None = None
        self._samples = SampleSums()

    def run(self, tape: Tape, micro_batch: MicroBatch, values: Values) -> None:
        """Backward of a micro-batch's share of the mean loss."""
        assert tape.result is not None
        leaves, spec = tape.result
        out = tree_unflatten([tape.value_of(x, values) for x in leaves], spec)
        loss, weight, sums = parts_of(out)
        self._samples.add(sums, counts=not micro_batch.is_filler)
        check_loss(loss)
        if self._weighs is None:
            self._weighs = weight is not None
        elif self._weighs != (weight is not None):
            raise some_weigh()
        if micro_batch.is_filler:
            weight = 0.0
        elif weight is None:
            weight = float(micro_batch.num_samples)
        elif isinstance(weight, Tensor):
            weight = weight.detach().double()
        share = weight / self._num_samples
        self._weightless.expect(weight)
        self._backward(loss * (share.to(loss.dtype) if isinstance(share, Tensor) else share))
        if not micro_batch.is_filler:
            self._loss = self._weightless.added(self._loss, loss, weight)
            self._weight = self._weight + weight

    def sums(self, device: torch.device) -> Sums:
        """Over this rank's micro-batches."""
        as_double = {"dtype": torch.float64, "device": device}
        return Sums(
            torch.as_tensor(self._loss, **as_double),
            torch.as_tensor(self._weight, **as_double),
            bool(self._weighs),
            self._samples,
        )
