"""Experimental: a batch that grows with the critical batch size, epoch by epoch (no torch).

Each decision is kept with its evidence; a run that is given the decisions of another takes them
again without measuring anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lbaccel.batch.stream import UpdateStream
from lbaccel.documents import json_of, text_of
from lbaccel.errors import InputError


class Loader(Protocol):
    """The part of `UpdateLoader` that this module uses."""

    next_update: int
    stream: UpdateStream

    @property
    def epoch(self) -> int:
        """Where the next update starts, from 0."""
        ...

    def grow(self, global_batch_size: int) -> int:
        """A new size from the next update on; returns the size taken."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision at the start of an epoch, with its evidence."""

    epoch: int  # numbered from 1
    update: int  # done before it
    before: int  # samples an update
    after: int
    critical_batch_size: float | None  # None: not measured, or unbounded
    low: float | None  # of its interval
    high: float | None  # None: unbounded, or not measured
    replayed: bool = False  # decided by another run; so is the evidence

    def __str__(self) -> str:
        moved = "stays at" if self.after == self.before else f"{self.before} ->"
        if self.critical_batch_size is None:
            why = "as in --batch-decisions"
            if not self.replayed:
                why = "the critical batch is not known yet"
        else:
            high = "unbounded" if self.high is None else f"{self.high:.0f}"
            why = f"critical batch {self.critical_batch_size:.0f} ({self.low:.0f} to {high})"
            why += ", as in --batch-decisions" if self.replayed else ""
        return f"epoch {self.epoch}: global batch {moved} {self.after}, {why}"


def next_size(size: int, *, low: float | None, largest: int) -> int:
    """Doubles `size` as long as the result is at most `low` and `largest`.

    `low` is the lower end of the critical batch's 95 % interval: to that size more samples an
    update cost less than twice the samples in all (McCandlish et al. 2018, arXiv 1812.06162,
    equation 2.11), with the confidence of the interval.

    >>> [next_size(256, low=low, largest=2048) for low in (None, 300.0, 1100.0, 9000.0)]
    [256, 256, 1024, 2048]
    """
    while low is not None and 2 * size <= min(low, largest):
        size *= 2
    return size


class AutoBatch:
    """Grows a loader's batch at the starts of epochs, never shrinks it.

    Args:
        loader: whose batch grows.
        largest: bound of the batch, in samples.
        average: of the run's noise scale, with `ratio` and `interval()`; not read in a replay.
        replay: decisions of another run, from `read_decisions`; None decides by `average`.
    """

    def __init__(
        self, loader: Loader, *, largest: int, average: Any, replay: Sequence[Decision] | None
    ) -> None:
        self.loader, self.largest, self.average = loader, largest, average
        self.decisions: list[Decision] = []
        self._replay = None if replay is None else {d.epoch: d for d in replay}

    def before_epoch(self) -> Decision | None:
        """Decide, if the next update is the first of an epoch and nothing was decided for it."""
        epoch, stream = self.loader.epoch, self.loader.stream
        first = stream.first_update(epoch) == self.loader.next_update
        done = self.decisions and self.decisions[-1].epoch > epoch
        if epoch == 0 or not first or done:
            return None
        before = stream.size_in(epoch)
        low = high = critical = None
        if self._replay is None:
            interval = self.average.interval()
            known = not interval.is_unknown and 0 < self.average.ratio < float("inf")
            if known:
                critical, low = self.average.ratio, interval.low
                high = interval.high if interval.high < float("inf") else None
            after = next_size(before, low=low, largest=self.largest)
        else:
            then, after = self._replay.get(epoch + 1), before
            if then is not None:
                after, critical, low, high = (
                    then.after, then.critical_batch_size, then.low, then.high,
                )  # fmt: skip
        if after != before:
            after = self.loader.grow(after)
        decision = Decision(
            epoch=epoch + 1,
            update=self.loader.next_update,
            before=before,
            after=after,
            critical_batch_size=critical,
            low=low,
            high=high,
            replayed=self._replay is not None,
        )
        self.decisions.append(decision)
        return decision

    def text(self) -> str:
        """All decisions, a JSON line each."""
        return "".join(json.dumps(asdict(decision)) + "\n" for decision in self.decisions)

    def state_dict(self) -> dict[str, Any]:
        """The decisions so far; the loader keeps the sizes."""
        return {"decisions": [asdict(decision) for decision in self.decisions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.decisions = [Decision(**fields) for fields in state["decisions"]]


def read_decisions(file: Path, *, first: int) -> list[Decision]:
    """The decisions of a run, in order.

    Args:
        file: a line a decision, as `AutoBatch.text` gives them.
        first: samples an update that this run starts with.

    Raises:
        InputError: no such file, a line that is no decision, or decisions from another start or
            that do not follow one on the other.
    """
    try:
        lines = text_of(file).splitlines()
        found = [Decision(**json_of(line, file)) for line in lines]
    except InputError as error:
        raise InputError(f"--batch-decisions {error}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"--batch-decisions {file} holds no decisions: {error}.") from error
    size, epoch = first, 1
    for decision in found:
        if decision.before != size or decision.after < size or decision.epoch <= epoch:
            raise InputError(
                f"--batch-decisions {file}: epoch {decision.epoch} goes from {decision.before} to "
                f"{decision.after}, after {size} in epoch {epoch}: sizes must follow one another, "
                f"and grow. Use --min-batch-size {found[0].before}, or another file."
            )
        size, epoch = decision.after, decision.epoch
    return found
