"""The loss of each micro-batch at the last level, and what is said of the passes that led there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lbaccel.batch.plan import MicroBatch
from lbaccel.update.global_norm.replay import Values
from lbaccel.update.global_norm.schedule import Schedule
from lbaccel.update.global_norm.tape import Tape
from lbaccel.update.loss_sums import LossSums, Sums
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
        self._backward, self._sums = backward, LossSums(num_samples, weightless)

    def run(self, tape: Tape, micro_batch: MicroBatch, values: Values) -> None:
        """Backward of a micro-batch's share of the mean loss."""
        assert tape.result is not None
        leaves, spec = tape.result
        out = tree_unflatten([tape.value_of(x, values) for x in leaves], spec)
        self._sums.take(out, micro_batch, self._backward)

    def sums(self) -> Sums:
        """Over this rank's micro-batches."""
        return self._sums.so_far()
