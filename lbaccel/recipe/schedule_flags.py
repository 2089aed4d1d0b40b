"""The flags of `lbaccel schedule` as a schedule: what they say together, and what they can't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lbaccel.batch.duration import MOST_EPOCHS, Duration
from lbaccel.batch.phases import Phase, phase_stream
from lbaccel.batch.rules import batch_schedule
from lbaccel.errors import InputError, check_number, check_whole
from lbaccel.optim.scaling import TABLE, explain_lr, rule_named, scale_lr
from lbaccel.optim.schedules import Schedule, make_schedule, warmup_start
from lbaccel.recipe.growth import milestones
from lbaccel.recipe.schedule_table import ScheduleTable, schedule_table

DECAYS = ("constant", "cosine")
LR_RULES = tuple(r.name for r in TABLE if not r.measured and not r.warmup_times_k)
KEEPS_FACTORS = ("bsi", "bsi-doubled-end", "mixed")  # they read past_max


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """The flags by their names, as `lbaccel schedule --help` describes them; None is not given."""

    batch_schedule: str
    global_batch_size: int
    milestones: Sequence[float] | None = None
    factor: Sequence[float] | None = None
    max_batch_size: int | None = None
    past_max: str = "drop"
    growth: float | None = None
    lr_growth: float | None = None
    batch_sizes: Sequence[int] | None = None
    lr_factors: Sequence[float] | None = None
    first_epoch: int | None = None
    world_size: int = 1
    epochs: float | None = None
    samples: int | None = None
    num_samples: int
    last_update: str = "keep"
    base_lr: float
    lr_scaling: str = "none"
    lr_exponent: float | None = None
    base_batch_size: int | None = None
    warmup: str = "none"
    warmup_epochs: float | None = None
    warmup_start: float | str | None = None
    schedule: str = "constant"


def compose(a: ScheduleFlags) -> tuple[ScheduleTable, list[str]]:
    """The schedule of the flags, with warmup and decay, and notes on it.

    Raises:
        InputError: see `batch_schedule`, `phase_updates`, `scale_lr` and `make_schedule`; no
            length of the run or two, scaling without a reference batch, a batch below the world
            size, a warmup that does not rise.
    """
    epochs = _epochs(a)
    build = partial(
        batch_schedule,
        a.batch_schedule,
        global_batch_size=a.global_batch_size,
        epochs=epochs,
        num_samples=a.num_samples,
        milestones=milestones(a.milestones, rule=a.batch_schedule, epochs=epochs),
        factors=a.factor,
        max_batch_size=a.max_batch_size,
        growth=a.growth,
        lr_growth=a.lr_growth,
        first_epoch=a.first_epoch,
        batch_sizes=a.batch_sizes,
        lr_factors=a.lr_factors,
    )
    phases = build(past_max=a.past_max)
    stream = phase_stream(phases, num_samples=a.num_samples, last_update=a.last_update)
    _check_ranks(phases, a.world_size)
    first_lr, notes = _first_lr(a)
    table = schedule_table(
        phases,
        epochs=epochs,
        num_samples=a.num_samples,
        last_update=a.last_update,
        first_lr=first_lr,
        multiplier=_multiplier(
            a, peak_lr=first_lr, epochs=epochs, samples_per_epoch=stream.samples_per_epoch
        ),
    )
    if a.past_max == "drop" and a.batch_schedule in KEEPS_FACTORS:
        notes += _lost(phases, build(past_max="lr"))
    notes += [
        f"From epoch {row.epoch} on there is no update: the run ends inside one of those before."
        for row in table.rows
        if not row.num_updates
    ]
    return table, notes


def _epochs(a: ScheduleFlags) -> float:
    """The length of the run."""
    check_whole("num_samples", a.num_samples)
    if a.epochs is not None and a.samples is not None:
        raise InputError(
            f"--epochs {a.epochs:.10g} and --samples {a.samples}: a run has one length. "
            "Use one of the two."
        )
    if a.samples is not None:
        check_whole("samples", a.samples)
        if a.samples > MOST_EPOCHS * a.num_samples:
            raise InputError(
                f"--samples {a.samples} are more than {MOST_EPOCHS:,.0f} epochs. Use fewer."
            )
        return a.samples / a.num_samples
    if a.epochs is None:
        raise InputError("the run has no length. Use --epochs 200, or --samples for the total.")
    check_number("epochs", a.epochs, at_most=MOST_EPOCHS)
    return a.epochs


def _check_ranks(phases: Sequence[Phase], world_size: int) -> None:
    check_whole("world_size", world_size)
    smallest = min(phases, key=lambda phase: phase.global_batch_size)
    if smallest.global_batch_size < world_size:
        raise InputError(
            f"global_batch_size={smallest.global_batch_size} from epoch {smallest.epoch} on is "
            f"smaller than world_size={world_size}: every rank needs at least one sample. "
            f"Use --world-size <= {smallest.global_batch_size}, or a larger --global-batch-size."
        )


def _first_lr(a: ScheduleFlags) -> tuple[float, list[str]]:
    """The learning rate of the first phase, and how it came about."""
    check_number("base_lr", a.base_lr)
    if "base_batch_size" not in rule_named(a.lr_scaling).reads:
        if a.lr_exponent is not None:
            raise InputError(
                f"--lr-exponent {a.lr_exponent:g} is not read without --lr-scaling power. Add it, "
                "or leave the exponent out."
            )
        if a.base_batch_size is not None:
            raise InputError(
                f"--base-batch-size {a.base_batch_size} is not read without a rule: --base-lr "
                f"{a.base_lr:g} is the learning rate at {a.global_batch_size}. "
                "Add --lr-scaling linear, or leave it out."
            )
        return a.base_lr, []
    if a.base_batch_size is None:
        raise InputError(
            f"--lr-scaling {a.lr_scaling} has no reference: at which batch is the learning rate "
            f"{a.base_lr:g}? Add --base-batch-size 256, say, or leave --lr-scaling out where it is "
            f"that of {a.global_batch_size}."
        )
    given = {
        "base_batch_size": a.base_batch_size,
        "global_batch_size": a.global_batch_size,
        "rule": a.lr_scaling,
        "exponent": a.lr_exponent,
    }
    return scale_lr(a.base_lr, **given), [explain_lr(a.base_lr, **given)]


def _multiplier(
    a: ScheduleFlags, *, peak_lr: float, epochs: float, samples_per_epoch: int
) -> Schedule:
    """Warmup and decay."""
    if a.warmup == "none":
        for flag, value in (("epochs", a.warmup_epochs), ("start", a.warmup_start)):
            if value is not None:
                raise InputError(
                    f"--warmup-{flag} {value} is not read without a warmup. Add --warmup gradual."
                )
    elif a.warmup_epochs is None:
        raise InputError(f"--warmup {a.warmup} has no length. Add --warmup-epochs 5, say.")
    start = "reference" if a.warmup_start is None else a.warmup_start
    if a.warmup in ("gradual", "constant") and warmup_start(a.base_lr, peak_lr, start=start) == 1:
        raise InputError(
            f"--warmup {a.warmup} starts at its own peak, {peak_lr:.6g}, so nothing rises. "
            "Use --warmup-start zero, or --lr-scaling with --base-batch-size (it then starts at "
            "--base-lr)."
        )
    return make_schedule(
        total=Duration(epochs=epochs),
        base_lr=a.base_lr,
        peak_lr=peak_lr,
        global_batch_size=a.global_batch_size,
        num_samples=samples_per_epoch,
        decay=a.schedule,
        warmup=a.warmup,
        warmup_duration=None if a.warmup_epochs is None else Duration(epochs=a.warmup_epochs),
        start=start,
    )


def _lost(phases: Sequence[Phase], kept: Sequence[Phase]) -> list[str]:
    """A note on the factor that the maximum cuts off; `kept` gives it to the learning rate."""
    share = phases[-1].lr_factor / kept[-1].lr_factor
    if share == 1:
        return []
    first = next(phase for phase in kept if phase not in phases)
    return [
        f"At {phases[-1].global_batch_size} samples, the maximum, a factor of {share:.6g} is "
        f"lost from epoch {first.epoch} on (--past-max lr: it divides the learning rate)."
    ]
