"""The phases of a batch-size schedule: what they are, and where their updates lie (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, inf
from typing import cast

from lbaccel.batch.duration import MOST_EPOCHS
from lbaccel.batch.stream import LastUpdate, UpdateStream
from lbaccel.errors import InputError, check_choice, check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From the start of `epoch` (the first is 1) on, this batch size and learning rate."""

    epoch: int
    global_batch_size: int
    lr_factor: float  # multiple of the first phase's learning rate; 1.0 at the first

    def lr(self, first_lr: float) -> float:
        """`first_lr * lr_factor`, of the numbers as people write them, rounded once.

        >>> 0.1 * 0.008, Phase(epoch=160, global_batch_size=128, lr_factor=0.008).lr(0.1)
        (0.0008..., 0.0008)

        Raises:
            InputError: the product is no finite number above 0.
        """
        # the fraction that was rounded to lr_factor, such as 1/3
        factor = Fraction(self.lr_factor).limit_denominator(10**6)
        if float(factor) != self.lr_factor:
            factor = Fraction(str(self.lr_factor))
        try:
            lr = float(Fraction(str(first_lr)) * factor)
        except OverflowError:
            lr = inf
        if not 0 < lr < inf:
            raise InputError(
                f"epoch {self.epoch} would have a learning rate of {lr}, {self.lr_factor:g} times "
                f"{first_lr:g}. Use a first rate or factors that give a number."
            )
        return lr


def growth_of(phases: Sequence[Phase]) -> tuple[tuple[int, int], ...]:
    """`UpdateStream`'s growth: epochs counted from 0, each with its number of samples an update.

    >>> lrd = [
    ...     Phase(epoch=epoch, global_batch_size=8, lr_factor=factor)
    ...     for epoch, factor in ((1, 1.0), (3, 0.5))
    ... ]
    >>> growth_of(lrd), growth_of([*lrd, Phase(epoch=5, global_batch_size=16, lr_factor=0.5)])
    ((), ((4, 16),))
    """
    return tuple(
        (phase.epoch - 1, phase.global_batch_size)
        for before, phase in pairwise(phases)
        if phase.global_batch_size != before.global_batch_size
    )


def phase_stream(phases: Sequence[Phase], *, num_samples: int, last_update: str) -> UpdateStream:
    """Where the updates of a schedule lie.

    Raises:
        InputError: an unknown `last_update`, or "drop" with a batch that changes.
    """
    check_choice("last_update", last_update, choices=("keep", "wrap", "drop"))
    sizes = sorted({phase.global_batch_size for phase in phases})
    if last_update == "drop" and len(sizes) > 1:
        raise InputError(
            f"last_update='drop' with batch sizes {', '.join(map(str, sizes))}: each would leave "
            "out other samples, so epochs would differ in length. Use last_update='keep' or 'wrap'."
        )
    return UpdateStream(
        phases[0].global_batch_size,
        num_samples,
        cast(LastUpdate, last_update),
        growth_of(phases),
    )


def phase_updates(
    phases: Sequence[Phase], *, epochs: float, num_samples: int, last_update: str = "keep"
) -> list[int]:
    """Updates of each phase in a run of `epochs` over `num_samples` samples: exact counts.

    With B the phase's batch size and N = `num_samples`: "keep" ends each epoch with a short
    update, ceil(N / B) an epoch. "wrap" cuts the stream of samples without regard to epochs: an
    update has the size of the phase in which its first sample lies, and may run over into the
    next one. "drop" leaves out what is no whole update, floor(N / B) an epoch; epochs of different
    batch sizes would then differ in their samples, so it is for one batch size alone. A run that
    ends inside an epoch has the updates that start before its end (rounded to a sample), and at
    least one.

    Args:
        phases: from `batch_schedule`, or made by hand: the first at epoch 1, in order.
        epochs: length of the run.
        num_samples: samples of the training set.
        last_update: "keep", "wrap" or "drop".

    Raises:
        InputError: phases out of order or past the run's end, a batch larger than the training
            set, an unknown `last_update`, "drop" with a batch that changes.

    >>> from lbaccel.batch.rules import batch_schedule
    >>> phases = batch_schedule("bsi", global_batch_size=128, epochs=200, num_samples=50_000)
    >>> phase_updates(phases, epochs=200, num_samples=50_000)
    [23069, 4740, 640, 164]
    >>> phase_updates(phases, epochs=200, num_samples=50_000, last_update="wrap")
    [23047, 4688, 625, 129]
    """
    check_phases(phases, epochs=epochs, num_samples=num_samples)
    stream = phase_stream(phases, num_samples=num_samples, last_update=last_update)
    total = stream.num_updates(epochs)
    firsts = [min(stream.first_update(phase.epoch - 1), total) for phase in phases]
    return [stop - first for first, stop in pairwise([*firsts, total])]


def check_phases(phases: Sequence[Phase], *, epochs: float, num_samples: int) -> None:
    """Stop at phases that are no schedule of this run.

    Raises:
        InputError: none, not from epoch 1 and factor 1 on, out of order or past the run's end, or
            a batch larger than the training set.
    """
    check_whole("num_samples", num_samples)
    check_number("epochs", epochs, at_most=MOST_EPOCHS)
    if not phases or phases[0].epoch != 1 or phases[0].lr_factor != 1:
        raise InputError(
            f"phases={list(phases)!r} do not begin at epoch 1 with lr_factor 1.0. "
            "Use a first Phase(epoch=1, global_batch_size=..., lr_factor=1.0)."
        )
    whole_epochs("phases", [phase.epoch for phase in phases[1:]], epochs=epochs)
    for phase in phases:
        check_size("global_batch_size", phase.global_batch_size, num_samples=num_samples)
        check_number("lr_factor", phase.lr_factor)


def whole_epochs(what: str, given: Sequence[float], *, epochs: float) -> list[int]:
    """Whole, increasing epochs from 2 on, the last one not after the run's end."""
    found: list[int] = []
    for epoch in given:
        check_number(what, epoch)
        if epoch != int(epoch) or epoch < 2:
            raise InputError(
                f"{what}: epoch {epoch:.10g} is no whole epoch from 2 on, and a change happens "
                "at the start of an epoch (the first is 1). Use whole epochs >= 2."
            )
        found.append(int(epoch))
    if any(later <= earlier for earlier, later in pairwise(found)):
        raise InputError(f"{what}: epochs {found} do not increase. Use them in order, each once.")
    if found and found[-1] > ceil(epochs):
        raise InputError(
            f"{what}: epoch {found[-1]} is after the last one of a run of {epochs:.10g} epochs, "
            f"epoch {ceil(epochs)}. Use epochs up to {ceil(epochs)}, or a longer run."
        )
    return found


def check_size(name: str, value: int, *, num_samples: int) -> None:
    """Stop at anything but a whole number from 1 to the training set.

    Raises:
        InputError: the value is none.
    """
    check_whole(name, value)
    if value > num_samples:
        raise InputError(
            f"{name}={value} is above the training set's {num_samples} samples. "
            f"Use {name} <= {num_samples}."
        )
