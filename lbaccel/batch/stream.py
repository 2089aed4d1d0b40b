"""Where updates lie in the stream of samples of epochs 0, 1, 2, ... (no torch)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from lbaccel.errors import InputError, check_whole

LastUpdate = Literal["wrap", "keep", "drop"]


class _Piece(NamedTuple):
    """A run of updates of one size."""

    update: int  # its first
    start: int  # position of that one's first sample
    size: int  # samples an update


@dataclass(frozen=True)
class UpdateStream:
    """Where each update lies in the endless stream of samples of epochs 0, 1, 2, ...

    With N = `num_samples` and B = `global_batch_size`, "wrap" cuts the stream every B samples, so
    an update runs over the epoch's end; "keep" ends each epoch with a short update of N mod B
    samples; "drop" leaves these out.

    B may change at the start of epochs: with `growth` = ((e1, B1), (e2, B2), ...), an update whose
    first sample lies in epoch e1 or later has B1 samples, from e2 on B2. Under "wrap" the update
    that runs over the start of e1 keeps its size.

    Args:
        global_batch_size: samples an update, up to the first change.
        num_samples: samples of an epoch.
        last_update: what becomes of an epoch's remainder.
        growth: pairs (epoch, counted from 0; samples an update from its start on), in order.

    Raises:
        InputError: a batch above N, changes out of order, or changes under "drop", where each
            size would leave out other samples.

    >>> stream = UpdateStream(4, 10, "wrap")
    >>> [stream.updates_in_epoch(e) for e in (0, 1)], stream.span(2)
    ([3, 2], (8, 4))
    >>> grown = UpdateStream(4, 10, "keep", growth=((1, 8),))
    >>> [grown.span(update) for update in range(5)]
    [(0, 4), (4, 4), (8, 2), (10, 8), (18, 2)]
    """

    global_batch_size: int
    num_samples: int
    last_update: LastUpdate = "wrap"
    growth: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_whole("num_samples", self.num_samples)
        if self.last_update not in ("wrap", "keep", "drop"):
            raise InputError(f"last_update={self.last_update!r} is not 'wrap', 'keep' or 'drop'.")
        if self.growth and self.last_update == "drop":
            raise InputError(
                "last_update='drop' with a batch size that changes: every size would leave out "
                "other samples, and epochs would differ in length. Use 'keep' or 'wrap'."
            )
        for (before, _), (after, _) in pairwise(((0, 0), *self.growth)):
            if after <= before:
                raise InputError(
                    f"growth={self.growth}: a change in epoch {after} does not come after epoch "
                    f"{before}. Use epochs from 1 on, in order."
                )
        for size in (self.global_batch_size, *(size for _, size in self.growth)):
            check_whole("global_batch_size", size)
            if size > self.num_samples:
                raise InputError(
                    f"global_batch_size={size} is above the training set's {self.num_samples} "
                    "samples. Use BatchPlan.capped(num_samples), which is full-batch training."
                )

    @property
    def samples_per_epoch(self) -> int:
        """Samples consumed in one epoch."""
        if self.last_update == "drop":
            return self.num_samples // self.global_batch_size * self.global_batch_size
        return self.num_samples

    @cached_property
    def _pieces(self) -> list[_Piece]:
        pieces = [_Piece(0, 0, self.global_batch_size)]
        for epoch, size in self.growth:
            update = self._first_update(pieces[-1], epoch)
            pieces.append(_Piece(update, self._start_in(pieces[-1], update), size))
        return pieces

    def _updates_per_epoch(self, size: int) -> int:
        """Under "keep" and "drop"."""
        n = self.num_samples
        return -(-n // size) if self.last_update == "keep" else n // size

    def _first_update(self, piece: _Piece, epoch: int) -> int:
        """The first update that starts in `epoch` or later, if updates went on as in `piece`."""
        past = epoch * self.num_samples - piece.start
        if self.last_update == "wrap":
            return piece.update + max(0, -(-past // piece.size))
        return piece.update + past // self.num_samples * self._updates_per_epoch(piece.size)

    def _start_in(self, piece: _Piece, update: int) -> int:
        index = update - piece.update
        if self.last_update == "wrap":
            return piece.start + index * piece.size
        epoch, within = divmod(index, self._updates_per_epoch(piece.size))
        return piece.start + epoch * self.num_samples + within * piece.size

    def _piece(self, update: int) -> _Piece:
        if not self.growth:
            return self._pieces[0]
        return self._pieces[bisect_right(self._pieces, update, key=lambda piece: piece.update) - 1]

    def _piece_before(self, epoch: int) -> _Piece:
        """The piece whose updates lead up to the start of `epoch`."""
        return self._pieces[bisect_left(self.growth, epoch, key=lambda change: change[0])]

    def first_update(self, epoch: int) -> int:
        """The first update that starts in `epoch` or later."""
        return self._first_update(self._piece_before(epoch), epoch)

    def updates_in_epoch(self, epoch: int) -> int:
        """Updates that start in `epoch`."""
        return self.first_update(epoch + 1) - self.first_update(epoch)

    def size_in(self, epoch: int) -> int:
        """Samples of a full update that starts in `epoch`."""
        return self._piece_before(epoch + 1).size

    def num_updates(self, epochs: float) -> int:
        """Updates of a run of `epochs` (may be a fraction); the last is completed."""
        whole = int(epochs)
        first = self.first_update(whole)
        if float(epochs).is_integer() and whole:
            return first
        rest = whole * self.num_samples - self._start(first)
        # exact: a float product may pass half a sample
        end = round(Fraction(str(epochs)) * self.samples_per_epoch)
        rest += end - whole * self.samples_per_epoch
        return max(1, first + max(0, -(-rest // self.size_in(whole))))

    def _start(self, update: int) -> int:
        return self._start_in(self._piece(update), update)

    def span(self, update: int) -> tuple[int, int]:
        """Position (epoch x N + offset) of its first sample in the stream, and its size."""
        piece = self._piece(update)
        start = self._start_in(piece, update)
        if self.last_update == "wrap":
            return start, piece.size
        return start, min(piece.size, self.num_samples - start % self.num_samples)

    def size_of(self, update: int) -> int:
        """Samples of a full update there: of an epoch's short last one, what it is the rest of."""
        return self._piece(update).size

    def samples_seen(self, update: int) -> int:
        """Samples consumed before `update`."""
        start = self._start(update)
        if self.last_update != "drop":
            return start
        epoch, offset = divmod(start, self.num_samples)
        return epoch * self.samples_per_epoch + offset
