"""Where updates lie in the stream of samples of epochs 0, 1, 2, ... (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lbaccel.errors import InputError, check_whole

LastUpdate = Literal["wrap", "keep", "drop"]


@dataclass(frozen=True)
class UpdateStream:
    """Where each update lies in the endless stream of samples of epochs 0, 1, 2, ...

    With N = `num_samples` and B = `global_batch_size`, "wrap" cuts the stream every B samples, so
    an update runs over the epoch's end; "keep" ends each epoch with a short update of N mod B
    samples; "drop" leaves these out.

    >>> stream = UpdateStream(4, 10, "wrap")
    >>> [stream.updates_in_epoch(e) for e in (0, 1)], stream.span(2)
    ([3, 2], (8, 4))
    """

    global_batch_size: int
    num_samples: int
    last_update: LastUpdate = "wrap"

    def __post_init__(self) -> None:
        check_whole("num_samples", self.num_samples)
        if self.last_update not in ("wrap", "keep", "drop"):
            raise InputError(f"last_update={self.last_update!r} is not 'wrap', 'keep' or 'drop'.")
        if self.global_batch_size > self.num_samples:
            raise InputError(
                f"global_batch_size={self.global_batch_size} is above the training set's "
                f"{self.num_samples} samples. Use BatchPlan.capped(num_samples), which is "
                "full-batch training."
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples consumed in one epoch."""
        if self.last_update == "drop":
            return self.num_samples // self.global_batch_size * self.global_batch_size
        return self.num_samples

    def first_update(self, epoch: int) -> int:
        """The first update that starts in `epoch`."""
        b, n = self.global_batch_size, self.num_samples
        if self.last_update == "wrap":
            return -(-epoch * n // b)
        return epoch * (-(-n // b) if self.last_update == "keep" else n // b)

    def updates_in_epoch(self, epoch: int) -> int:
        """Updates that start in `epoch`."""
        return self.first_update(epoch + 1) - self.first_update(epoch)

    def num_updates(self, epochs: float) -> int:
        """Updates of a run of `epochs` (may be a fraction); the last is completed under "wrap"."""
        if self.last_update != "wrap" and float(epochs).is_integer():
            return self.first_update(int(epochs))
        samples = round(epochs * self.samples_per_epoch)
        return max(1, -(-samples // self.global_batch_size))

    def span(self, update: int) -> tuple[int, int]:
        """Position (epoch x N + offset) of its first sample in the stream, and its size."""
        b, n = self.global_batch_size, self.num_samples
        if self.last_update == "wrap":
            return update * b, b
        epoch, index = divmod(update, self.updates_in_epoch(0))
        return epoch * n + index * b, min(b, n - index * b)

    def samples_seen(self, update: int) -> int:
        """Samples consumed before `update`."""
        if self.last_update == "wrap":
            return update * self.global_batch_size
        epoch, index = divmod(update, self.updates_in_epoch(0))
        return epoch * self.samples_per_epoch + index * self.global_batch_size
