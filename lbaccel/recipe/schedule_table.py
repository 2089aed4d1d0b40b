"""A batch-size schedule with its learning rates: a row a segment, and a picture (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import log
from pathlib import Path

from lbaccel.batch.phases import Segment, segment_stream, segment_updates
from lbaccel.optim.schedules import Schedule, constant
from lbaccel.runs.figures import new_figure, save

CURVE_POINTS = 200  # a segment


@dataclass(frozen=True, kw_only=True)
class Row:
    """A segment as it is trained: `lr` at its first update, `last_lr` at its last."""

    epoch: int
    global_batch_size: int
    lr: float
    last_lr: float
    num_updates: int


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """A schedule with its warmup and decay, and the steady run that it is compared with."""

    rows: tuple[Row, ...]
    epochs: float
    num_updates: int
    num_updates_steady: int  # of the first batch size, kept
    curve: tuple[tuple[float, float], ...]  # epoch (the run starts at 1), learning rate

    @property
    def moves(self) -> bool:
        """Whether the learning rate changes inside a segment."""
        return any(row.lr != row.last_lr for row in self.rows)


def schedule_table(
    segments: Sequence[Segment],
    *,
    epochs: float,
    num_samples: int,
    first_lr: float,
    last_update: str = "keep",
    multiplier: Schedule = constant,
) -> ScheduleTable:
    """Updates and learning rates of each segment: lr(s) = `first_lr` x `lr_factor` x multiplier(s).

    s is the samples seen before an update, as in `lbaccel.optim.schedules`.

    Args:
        segments: from `batch_schedule`.
        epochs: length of the run.
        num_samples: samples of the training set.
        first_lr: peak learning rate of the first segment.
        last_update: see `segment_updates`.
        multiplier: warmup and decay, from `make_schedule`.

    Raises:
        InputError: see `segment_updates`.

    >>> from lbaccel.batch.rules import batch_schedule
    >>> segments = batch_schedule("lrd", global_batch_size=128, epochs=200, num_samples=50_000)
    >>> table = schedule_table(segments, epochs=200, num_samples=50_000, first_lr=0.1)
    >>> [row.lr for row in table.rows], table.num_updates
    ([0.1, 0.02, 0.004, 0.0008], 78200)
    """
    updates = partial(
        segment_updates, epochs=epochs, num_samples=num_samples, last_update=last_update
    )
    counts = updates(segments)
    stream = segment_stream(segments, num_samples=num_samples, last_update=last_update)
    samples = stream.samples_per_epoch
    firsts = [0, *accumulate(counts)][:-1]
    starts = [stream.samples_seen(first) for first in firsts]
    ends = [*starts[1:], epochs * samples]
    rows: list[Row] = []
    curve: list[tuple[float, float]] = []
    for segment, first, num_updates, start, end in zip(
        segments, firsts, counts, starts, ends, strict=True
    ):
        rate = segment.lr(first_lr)
        last = stream.samples_seen(first + max(0, num_updates - 1))
        rows.append(
            Row(
                epoch=segment.epoch,
                global_batch_size=segment.global_batch_size,
                lr=rate * multiplier(start),
                last_lr=rate * multiplier(last),
                num_updates=num_updates,
            )
        )
        points = (start + (end - start) * i / CURVE_POINTS for i in range(CURVE_POINTS + 1))
        curve += [(1 + at / samples, rate * multiplier(at)) for at in points]
    return ScheduleTable(
        rows=tuple(rows),
        epochs=epochs,
        num_updates=sum(counts),
        num_updates_steady=sum(updates(segments[:1])),
        curve=tuple(curve),
    )


def plot(table: ScheduleTable, path: Path, *, title: str) -> None:
    """Draw batch size and learning rate over epochs, one above the other."""
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = new_figure(7, 5)
    upper, lower = figure.subplots(2, sharex=True)
    end = 1 + table.epochs
    epochs = [row.epoch for row in table.rows]
    sizes = [row.global_batch_size for row in table.rows]
    rates = [rate for _, rate in table.curve]
    upper.step([*epochs, end], [*sizes, sizes[-1]], where="post")
    lower.plot([epoch for epoch, _ in table.curve], rates, color="C1")
    for axes, values, is_log in (
        (upper, sizes, len(set(sizes)) > 1),
        (lower, rates, not table.moves and max(rates) > 4 * min(rates)),
    ):
        if is_log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * max(values))
        if axes is upper or not table.moves:
            ticks = _apart(values, scale=log if is_log else float)
            axes.set_yticks(ticks, [f"{tick:.6g}" for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    upper.set_title(title, fontsize=9)
    upper.set_ylabel("global batch (samples)")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("epoch (a change is at its start)")
    lower.set_xlim(1, end)
    if len(epochs) > 1:
        lower.set_xticks(_apart(epochs, scale=float))
    save(figure, path)


def _apart(values: Iterable[float], *, scale: Callable[[float], float]) -> list[float]:
    """Of the values, largest first, those far enough apart on the axis to be read."""
    found: list[float] = []
    every = sorted(set(values), reverse=True)
    span = scale(every[0]) - scale(every[-1])
    for value in every:
        if not found or scale(found[-1]) - scale(value) >= 0.07 * span:
            found.append(value)
    return found
