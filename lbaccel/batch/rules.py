"""Batch-size schedules: how batch and learning rate change from epoch to epoch (no torch).

A schedule is a tuple of `Phase`s. Epochs are numbered from 1, and a change happens at the start
of its epoch. `docs/methods.md` says where each rule fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil, inf

from lbaccel.batch.growth import BY_EPOCH, READ_BY, Frame, Growth
from lbaccel.batch.phases import Phase, check_size, whole_epochs
from lbaccel.errors import InputError, check_choice, check_number

RULES = ("lrd", "bsi", "bsi-doubled-end", "steady", "mixed", "fast", "instant", "listed")
MILESTONES = (60, 120, 160)
FACTORS = {"lrd": (5,), "bsi": (5,), "bsi-doubled-end": (5,), "mixed": (4, 4, 50), "fast": (2,)}
MAX_STEPS = 1000  # of "fast" and "instant"

Change = tuple[int, Fraction, Fraction]
"""Epoch, factor of the batch size, factor of the learning rate."""


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
) -> tuple[Phase, ...]:
    """The phases of a run under a rule, those alone that change something.

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
        global_batch_size: samples of an update in the first phase.
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
        lr_factors: multiple of the first phase's learning rate from each milestone on, for
            "listed" (default: it stays).

    Raises:
        InputError: an unknown rule; a setting that the rule does not read; milestones out of order
            or past the run's end; factors of 1 or less, or not as many as milestones; a batch that
            is no whole number of samples or larger than the training set; nothing that can grow.

    Source: a thesis on large and increasing batch sizes, chapters 3 to 5; "bsi" and
    `past_max="lr"` after Smith et al. 2018 (arXiv 1711.00489).

    >>> for phase in batch_schedule(
    ...     "bsi", global_batch_size=2048, factors=4, epochs=200, num_samples=50_000, past_max="lr"
    ... ):
    ...     print(phase.epoch, phase.global_batch_size, phase.lr_factor)
    1 2048 1.0
    60 8192 1.0
    120 32768 1.0
    160 50000 0.3814697265625
    """
    check_choice("rule", rule, choices=RULES)
    asked = Growth(
        milestones=milestones,
        factors=factors,
        max_batch_size=max_batch_size,
        past_max=past_max,
        growth=growth,
        lr_growth=lr_growth,
        first_epoch=first_epoch,
        batch_sizes=batch_sizes,
        lr_factors=lr_factors,
    )
    frame = Frame(global_batch_size=global_batch_size, epochs=epochs, num_samples=num_samples)
    asked.check(rule, frame)
    changes = [*_of_milestones(rule, asked, frame), *_of_epochs(rule, asked, frame)]
    largest = asked.largest(frame)
    return _fold(sorted(changes), global_batch_size, largest=largest, past_max=past_max)


def _of_milestones(rule: str, asked: Growth, frame: Frame) -> list[Change]:
    """The changes at milestones."""
    if rule not in READ_BY["milestones"]:
        return []
    given = MILESTONES if asked.milestones is None else asked.milestones
    at = whole_epochs("milestones", given, epochs=frame.epochs)
    if not at and rule != "fast":
        raise InputError(
            f"rule={rule!r} has no milestones, so nothing would change. Use milestones such "
            "as (60, 120, 160), or rule='steady'."
        )
    if rule != "listed":
        factors = FACTORS[rule] if asked.factors is None else asked.factors
        return list(_at_milestones(rule, at, _factors(rule, factors, milestones=at)))
    sizes = _listed("batch_sizes", asked.batch_sizes, first=frame.global_batch_size, milestones=at)
    for size in asked.batch_sizes or ():
        check_size("batch_sizes", size, num_samples=frame.num_samples)
    rates = _listed("lr_factors", asked.lr_factors, first=1, milestones=at)
    return list(zip(at, sizes, rates, strict=True))


def _of_epochs(rule: str, asked: Growth, frame: Frame) -> list[Change]:
    """The changes of "fast" and "instant" from `first_epoch` on."""
    if rule not in BY_EPOCH:
        return []
    first = 6 if asked.first_epoch is None else asked.first_epoch
    (start,) = whole_epochs("first_epoch", [first], epochs=frame.epochs)
    largest = asked.largest(frame)
    growth = 2 if asked.growth is None else asked.growth
    steps = _steps_to(largest, frame.global_batch_size, growth)
    lr_step = _decimal("lr_growth", 1.3 if asked.lr_growth is None else asked.lr_growth)
    if rule == "instant":
        return [(start, Fraction(largest, frame.global_batch_size), lr_step ** len(steps))]
    epochs_left = ceil(frame.epochs) - start + 1
    grown = [(start + i, step, lr_step) for i, step in enumerate(steps)]
    return grown[:epochs_left]


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
) -> Iterator[Change]:
    for i, (epoch, factor) in enumerate(zip(milestones, factors, strict=True)):
        if rule in ("lrd", "fast") or (rule == "mixed" and i == 0):
            yield epoch, Fraction(1), 1 / factor
        else:
            doubled = rule == "bsi-doubled-end" and epoch == milestones[-1]
            yield epoch, factor * (2 if doubled else 1), Fraction(1)


def _fold(
    changes: Sequence[Change],
    global_batch_size: int,
    *,
    largest: int,
    past_max: str,
) -> tuple[Phase, ...]:
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
        Phase(epoch=epoch, global_batch_size=int(size), lr_factor=_rounded(factor, epoch))
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
    steps: list[Fraction] = []
    reached = Fraction(size)
    while reached < largest:
        if len(steps) == MAX_STEPS:
            raise InputError(
                f"growth={growth!r} takes more than {MAX_STEPS} epochs from {size} to {largest} "
                "samples. Use a larger growth, such as 2."
            )
        steps.append(factor)
        reached *= factor
    return steps


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
