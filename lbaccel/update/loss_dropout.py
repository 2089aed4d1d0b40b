"""Loss dropout: an update whose loss is below the one before it writes no weights (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError, check_whole


class LossDropout:
    """Says of each update whether its gradient is dropped, and remembers what it needs for that.

    Within an epoch, update u is dropped if loss_u < loss_(u - 1), whether or not update u - 1 was
    dropped; the first update of an epoch never is. Epochs before `first_epoch` and after
    `last_epoch` drop nothing. Its BatchNorm statistics have moved and its forward and backward
    were computed: what is saved is the change of the weights, not time.

    Args:
        stream: where updates lie; an update belongs to the epoch of its first sample. A function
            that gives it, where the batch grows as the run decides.
        first_epoch: the first epoch that may drop, numbered from 1.
        last_epoch: the last one.

    Raises:
        InputError: epochs that are not whole, below 1 or in the wrong order.

    Source: a thesis on large and increasing batch sizes, section 4.1.2 (epochs 3 to 119 of 200).

    >>> drops = LossDropout(UpdateStream(5, 10, "keep"), first_epoch=1, last_epoch=2)
    >>> [drops(loss, update) for update, loss in enumerate((2.0, 1.5, 1.0, 1.2))]
    [False, True, False, False]
    """

    def __init__(
        self,
        stream: UpdateStream | Callable[[], UpdateStream],
        *,
        first_epoch: int,
        last_epoch: int,
    ) -> None:
        check_whole("first_epoch", first_epoch)
        check_whole("last_epoch", last_epoch)
        if last_epoch < first_epoch:
            raise InputError(
                f"loss dropout from epoch {first_epoch} to {last_epoch}: the last is before the "
                f"first. Use last_epoch >= {first_epoch}."
            )
        self._stream = stream
        self.first_epoch, self.last_epoch = first_epoch, last_epoch
        self.num_dropped = 0
        self._epoch, self._loss = 0, 0.0

    @property
    def stream(self) -> UpdateStream:
        """Where updates lie, as it stands."""
        return self._stream() if callable(self._stream) else self._stream

    def __call__(self, loss: float, update: int) -> bool:
        """Whether update number `update` (from 0), with its mean loss, is dropped."""
        stream = self.stream
        epoch = stream.span(update)[0] // stream.num_samples + 1
        drops = (
            self.first_epoch <= epoch <= self.last_epoch
            and epoch == self._epoch
            and loss < self._loss
        )
        self._epoch, self._loss = epoch, loss
        self.num_dropped += drops
        return drops

    def state_dict(self) -> dict[str, Any]:
        """The loss before, its epoch, and how many were dropped."""
        return {"epoch": self._epoch, "loss": self._loss, "num_dropped": self.num_dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._epoch, self._loss = int(state["epoch"]), float(state["loss"])
        self.num_dropped = int(state["num_dropped"])
