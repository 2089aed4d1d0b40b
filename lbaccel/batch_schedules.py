"""Batch-size schedules: how batch and learning rate change from epoch to epoch (no torch).

A schedule is a tuple of `Segment`s. Epochs are numbered from 1, and a change happens at the start
of its epoch. `docs/methods.md` says where each rule fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, inf

from lbaccel.errors import InputError, check_choice, check_number, check_whole

RULES = ("lrd", "bsi", "bsi-doubled-end", "steady", "mixed", "fast", "instant", "listed")
MILESTONES = (60, 120, 160)
FACTORS = {"lrd": (5,), "bsi": (5,), "bsi-doubled-end": (5,), "mixed": (4, 4, 50), "fast": (2,)}
PAST_MAX = ("drop", "lr")
MAX_STEPS = 1000  # of "fast" and "instant"

_AT_MILESTONES = ("lrd", "bsi", "bsi-doubled-end", "mixed", "fast")
_GROWING = ("bsi", "bsi-doubled-end", "mixed", "fast", "instant")
_BY_EPOCH = ("fast", "instant")
_READ_BY = {
    "milestones": (*_AT_MILESTONES, "listed"),
    "factors": _AT_MILESTONES,
    "max_batch_size": _GROWING,
    "past_max": ("bsi", "bsi-doubled-end", "mixed"),
    "growth": _BY_EPOCH,
    "lr_growth": _BY_EPOCH,
    "first_epoch": _BY_EPOCH,
    "batch_sizes": ("listed",),
    "lr_factors": ("listed",),
}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """From the start of `epoch` (the first is 1) on, this batch size and learning rate."""

    epoch: int
    global_batch_size: int
    lr_factor: float  # multiple of the first segment's learning rate; 1.0 at the first

    def lr(self, first_lr: float) -> float:
        """`first_lr * lr_factor`, of the numbers as people write them, rounded once.

        >>> 0.1 * 0.008, Segment(epoch=160, global_batch_size=128, lr_factor=0.008).lr(0.1)
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


def batch_schedule(
    rule: str,
    *,
    global_batch_size: int,
    epochs: float,
    num_samples: int,
    milestones: Sequence[float] | None = None,
    factors: float | Sequence[float] | None = None,
    max_batch_size: int | None = None,
    past_max: str = "drop",
    growth: float | None = None,
    lr_growth: float | None = None,
    first_epoch: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    lr_factors: Sequence[float] | None = None,
) -> tuple[Segment, ...]:
    """The segments of a run under a rule, those alone that change something.

    With B the batch size, eta the learning rate, f a milestone's factor, M = `max_batch_size`:

    - "steady": nothing changes.
    - "lrd": eta <- eta / f at each milestone.
    - "bsi": B <- min(f B, M) at each milestone.
    - "bsi-doubled-end": as "bsi", with 2 f at the last milestone (factor 2 gives 2, 2, 4).
    - "mixed": eta <- eta / f1 at the first milestone, B <- min(f B, M) at the second and third.
    - "fast": from `first_epoch` on, at each epoch, B <- min(`growth` B, M) and
      eta <- `lr_growth` eta until B = M; eta <- eta / f at each milestone.
    - "instant": B <- M at `first_epoch`, and eta <- `lr_growth` ^ n eta, where n is the number of
      steps that "fast" takes to M: the smallest with `growth` ^ n B >= M.
    - "listed": B and eta / (the first eta) at each milestone as `batch_sizes` and `lr_factors` say.

    Factors are decimal numbers and are multiplied exactly: 1 / 5 / 5 / 5 is 0.008.

    Args:
        rule: one of `RULES`.
        global_batch_size: samples of an update in the first segment.
        epochs: length of the run; its last epoch may be a fraction.
        num_samples: samples of the training set.
        milestones: epochs at whose start something changes: whole, from 2 on, increasing
            (default: 60, 120, 160).
        factors: one for all milestones, or one a milestone, above 1 (default: 5; "mixed" 4, 4, 50;
            "fast" 2).
        max_batch_size: no batch is larger (default: `num_samples`).
        past_max: what becomes of the part of a factor for which `max_batch_size` leaves no room.
            "drop": it is lost. "lr": it divides the learning rate, f B / M.
        growth: factor of the batch size at an epoch of "fast" (default: 2).
        lr_growth: factor of the learning rate at an epoch of "fast" (default: 1.3).
        first_epoch: the first epoch with a larger batch, for "fast" and "instant" (default: 6).
        batch_sizes: samples of an update from each milestone on, for "listed" (default: they stay).
        lr_factors: multiple of the first segment's learning rate from each milestone on, for
            "listed" (default: it stays).

    Raises:
        InputError: an unknown rule; a setting that the rule does not read; milestones out of order
            or past the run's end; factors of 1 or less, or not as many as milestones; a batch that
            is no whole number of samples or larger than the training set; nothing that can grow.

    Source: study E, chapters 3 to 5 (a thesis on large and increasing batch sizes); "bsi" and
    `past_max="lr"` after Smith et al. 2018 (arXiv 1711.00489).

    >>> for segment in batch_schedule(
    ...     "bsi", global_batch_size=2048, factors=4, epochs=200, num_samples=50_000, past_max="lr"
    ... ):
    ...     print(segment.epoch, segment.global_batch_size, segment.lr_factor)
    1 2048 1.0
    60 8192 1.0
    120 32768 1.0
    160 50000 0.3814697265625
    """
    check_choice("rule", rule, choices=RULES)
    check_choice("past_max", past_max, choices=PAST_MAX)
    check_whole("num_samples", num_samples)
    check_number("epochs", epochs)
    _check_size("global_batch_size", global_batch_size, num_samples=num_samples)
    given = {
        "milestones": milestones,
        "factors": factors,
        "max_batch_size": max_batch_size,
        "past_max": None if past_max == "drop" else past_max,
        "growth": growth,
        "lr_growth": lr_growth,
        "first_epoch": first_epoch,
        "batch_sizes": batch_sizes,
        "lr_factors": lr_factors,
    }
    for name, value in given.items():
        if value not in (None, ()) and rule not in _READ_BY[name]:
            raise InputError(
                f"rule={rule!r} does not read {name}={value!r}. Leave {name} out, or use rule="
                f"{' or '.join(repr(other) for other in _READ_BY[name])}."
            )
    largest = num_samples if max_batch_size is None else max_batch_size
    _check_size("max_batch_size", largest, num_samples=num_samples)
    if rule in _GROWING and (
        largest < global_batch_size or (largest == global_batch_size and past_max == "drop")
    ):
        raise InputError(
            f"max_batch_size={largest} leaves global_batch_size={global_batch_size} no room to "
            f"grow under rule={rule!r}. Use max_batch_size > {global_batch_size}, or a smaller "
            "global_batch_size, or rule='steady'."
        )
    changes: list[tuple[int, Fraction, Fraction]] = []
    if rule in _READ_BY["milestones"]:
        at = _whole_epochs(
            "milestones", MILESTONES if milestones is None else milestones, epochs=epochs
        )
        if not at and rule != "fast":
            raise InputError(
                f"rule={rule!r} has no milestones, so nothing would change. Use milestones such "
                "as (60, 120, 160), or rule='steady'."
            )
        if rule == "listed":
            sizes = _listed("batch_sizes", batch_sizes, first=global_batch_size, milestones=at)
            for size in batch_sizes or ():
                _check_size("batch_sizes", size, num_samples=num_samples)
            rates = _listed("lr_factors", lr_factors, first=1, milestones=at)
            changes += zip(at, sizes, rates, strict=True)
        else:
            by = _factors(rule, FACTORS[rule] if factors is None else factors, milestones=at)
            changes += _at_milestones(rule, at, by)
    if rule in _BY_EPOCH:
        (start,) = _whole_epochs(
            "first_epoch", [6 if first_epoch is None else first_epoch], epochs=epochs
        )
        steps = _steps_to(largest, global_batch_size, 2 if growth is None else growth)
        lr_step = _decimal("lr_growth", 1.3 if lr_growth is None else lr_growth)
        if rule == "instant":
            changes.append((start, Fraction(largest, global_batch_size), lr_step ** len(steps)))
        else:
            epochs_left = ceil(epochs) - start + 1
            grown = [(start + i, step, lr_step) for i, step in enumerate(steps)]
            changes += grown[:epochs_left]
    return _fold(sorted(changes), global_batch_size, largest=largest, past_max=past_max)


def segment_updates(
    segments: Sequence[Segment], *, epochs: float, num_samples: int, last_update: str = "keep"
) -> list[int]:
    """Updates of each segment in a run of `epochs` over `num_samples` samples: exact counts.

    With B the segment's batch size and N = `num_samples`: "keep" ends each epoch with a short
    update, ceil(N / B) an epoch. "wrap" cuts the stream of samples without regard to epochs: an
    update has the size of the segment in which its first sample lies, and may run over into the
    next one. "drop" leaves out what is no whole update, floor(N / B) an epoch; epochs of different
    batch sizes would then differ in their samples, so it is for one batch size alone. A run that
    ends inside an epoch has the updates that start before its end (rounded to a sample), and at
    least one.

    Args:
        segments: from `batch_schedule`, or made by hand: the first at epoch 1, in order.
        epochs: length of the run.
        num_samples: samples of the training set.
        last_update: "keep", "wrap" or "drop".

    Raises:
        InputError: segments out of order or past the run's end, a batch larger than the training
            set, an unknown `last_update`, "drop" with a batch that changes.

    >>> segments = batch_schedule("bsi", global_batch_size=128, epochs=200, num_samples=50_000)
    >>> segment_updates(segments, epochs=200, num_samples=50_000)
    [23069, 4740, 640, 164]
    >>> segment_updates(segments, epochs=200, num_samples=50_000, last_update="wrap")
    [23047, 4688, 625, 129]
    """
    check_segments(segments, epochs=epochs, num_samples=num_samples)
    samples = epoch_samples(segments, num_samples=num_samples, last_update=last_update)
    whole = int(epochs)
    end = max(1, whole * samples + round((Fraction(str(epochs)) - whole) * samples))
    starts = [(segment.epoch - 1) * samples for segment in segments]
    counts, position = [], 0
    for segment, start, stop in zip(segments, starts, [*starts[1:], end], strict=True):
        size = segment.global_batch_size
        if last_update == "wrap":
            count = max(0, ceil(Fraction(stop - position, size)))
            position += count * size
        else:
            whole_epochs, rest = divmod(max(0, stop - start), samples)
            count = whole_epochs * ceil(Fraction(samples, size)) + ceil(Fraction(rest, size))
        counts.append(count)
    return counts


def epoch_samples(segments: Sequence[Segment], *, num_samples: int, last_update: str) -> int:
    """Samples that an epoch consumes: all of them but under "drop", floor(N / B) B.

    Raises:
        InputError: an unknown `last_update`, or "drop" with a batch that changes.
    """
    check_choice("last_update", last_update, choices=("keep", "wrap", "drop"))
    sizes = sorted({segment.global_batch_size for segment in segments})
    if last_update != "drop":
        return num_samples
    if len(sizes) > 1:
        raise InputError(
            f"last_update='drop' with batch sizes {', '.join(map(str, sizes))}: each would leave "
            "out other samples, so epochs would differ in length. Use last_update='keep' or 'wrap'."
        )
    return num_samples // sizes[0] * sizes[0]


def check_segments(segments: Sequence[Segment], *, epochs: float, num_samples: int) -> None:
    """Stop at segments that are no schedule of this run.

    Raises:
        InputError: none, not from epoch 1 and factor 1 on, out of order or past the run's end, or
            a batch larger than the training set.
    """
    check_whole("num_samples", num_samples)
    check_number("epochs", epochs)
    if not segments or segments[0].epoch != 1 or segments[0].lr_factor != 1:
        raise InputError(
            f"segments={list(segments)!r} do not begin at epoch 1 with lr_factor 1.0. "
            "Use a first Segment(epoch=1, global_batch_size=..., lr_factor=1.0)."
        )
    _whole_epochs("segments", [segment.epoch for segment in segments[1:]], epochs=epochs)
    for segment in segments:
        _check_size("global_batch_size", segment.global_batch_size, num_samples=num_samples)
        check_number("lr_factor", segment.lr_factor)


def _listed(
    name: str, values: Sequence[float] | None, *, first: int, milestones: Sequence[int]
) -> list[Fraction]:
    """Factors from value to value, beginning with `first`."""
    if not values:
        return [Fraction(1)] * len(milestones)
    if len(values) != len(milestones):
        raise InputError(
            f"rule='listed' has {len(values)} {name} for {len(milestones)} milestones. Use one "
            "from each milestone on."
        )
    exact = [Fraction(first), *(_decimal(name, value) for value in values)]
    return [after / before for before, after in pairwise(exact)]


def _at_milestones(
    rule: str, milestones: Sequence[int], factors: Sequence[Fraction]
) -> Iterator[tuple[int, Fraction, Fraction]]:
    """Epoch, factor of the batch size, factor of the learning rate."""
    for i, (epoch, factor) in enumerate(zip(milestones, factors, strict=True)):
        if rule in ("lrd", "fast") or (rule == "mixed" and i == 0):
            yield epoch, Fraction(1), 1 / factor
        else:
            doubled = rule == "bsi-doubled-end" and epoch == milestones[-1]
            yield epoch, factor * (2 if doubled else 1), Fraction(1)


def _fold(
    changes: Sequence[tuple[int, Fraction, Fraction]],
    global_batch_size: int,
    *,
    largest: int,
    past_max: str,
) -> tuple[Segment, ...]:
    """Apply changes one after the other, in exact arithmetic; those that change nothing go."""
    size, factor = Fraction(global_batch_size), Fraction(1)
    reached = {1: (size, factor)}
    for epoch, grow, lr in changes:
        wanted, size = size * grow, min(size * grow, Fraction(largest))
        factor *= lr
        if past_max == "lr":
            factor /= wanted / size
        if size.denominator != 1:
            raise InputError(
                f"epoch {epoch} would have a global batch of {float(size):.10g} samples, "
                f"{float(grow):.10g} times {float(size / grow):.10g}: no whole number. "
                "Use factors that give one."
            )
        reached[epoch] = (size, factor)
    states = list(reached.items())
    kept = [states[0], *(new for old, new in pairwise(states) if new[1] != old[1])]
    return tuple(
        Segment(epoch=epoch, global_batch_size=int(size), lr_factor=_rounded(factor, epoch))
        for epoch, (size, factor) in kept
    )


def _rounded(factor: Fraction, epoch: int) -> float:
    try:
        lr_factor = float(factor)
    except OverflowError:
        lr_factor = inf
    if not 0 < lr_factor < inf:
        raise InputError(
            f"epoch {epoch} would have {lr_factor} times the first learning rate. "
            "Use factors nearer to 1."
        )
    return lr_factor


def _steps_to(largest: int, size: int, growth: float) -> list[Fraction]:
    """The factors of "fast" until `largest` is reached."""
    factor = _decimal("growth", growth)
    if factor <= 1:
        raise InputError(f"growth={growth!r} does not grow a batch. Use growth > 1, such as 2.")
    steps, reached = [], Fraction(size)
    while reached < largest:
        if len(steps) == MAX_STEPS:
            raise InputError(
                f"growth={growth!r} takes more than {MAX_STEPS} epochs from {size} to {largest} "
                "samples. Use a larger growth, such as 2."
            )
        steps.append(factor)
        reached *= factor
    return steps


def _whole_epochs(what: str, given: Sequence[float], *, epochs: float) -> list[int]:
    """Whole, increasing epochs from 2 on, the last one not after the run's end."""
    found = []
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


def _factors(
    rule: str, factors: float | Sequence[float], *, milestones: Sequence[int]
) -> list[Fraction]:
    """One exact factor a milestone."""
    values = [factors] if isinstance(factors, (int, float, str)) else list(factors)
    count = len(milestones)
    if rule == "mixed" and count != 3:
        raise InputError(
            f"rule='mixed' changes at three milestones and has {count}. Use three, such as "
            "(60, 120, 160)."
        )
    if len(values) not in (1, count) or (rule == "bsi-doubled-end" and len(values) != 1):
        allowed = "one" if rule == "bsi-doubled-end" else f"one, or {count}"
        raise InputError(
            f"rule={rule!r} has {len(values)} factors for {count} milestones. Use {allowed}"
            + (" (rule='bsi' takes one a milestone)." if rule == "bsi-doubled-end" else ".")
        )
    exact = [_decimal("factors", value) for value in values]
    for value, factor in zip(values, exact, strict=True):
        if factor <= 1:
            raise InputError(
                f"factors: {value!r} is not above 1, so its milestone would change nothing or "
                "undo another. Use factors > 1."
            )
    return exact if len(exact) == count else exact * count


def _decimal(name: str, value: float) -> Fraction:
    """The user's 1.3 is thirteen tenths, not the binary fraction beside it."""
    check_number(name, value)
    return Fraction(str(value))


def _check_size(name: str, value: int, *, num_samples: int) -> None:
    check_whole(name, value)
    if value > num_samples:
        raise InputError(
            f"{name}={value} is above the training set's {num_samples} samples. "
            f"Use {name} <= {num_samples}."
        )
