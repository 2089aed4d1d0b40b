"""The recipe's `--batch-schedule`: sizes for the loader, factors for the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lbaccel.batch.phases import Phase, phase_updates
from lbaccel.batch.rules import MILESTONES, batch_schedule
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError, check_number
from lbaccel.optim.scaling import rule_named
from lbaccel.optim.schedules import Schedule
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_training import RateOptions

Say = Callable[[str], object]


def phases_of(
    batch: BatchOptions, rate: RateOptions, *, num_samples: int, say: Say
) -> tuple[Phase, ...]:
    """The phases that the settings ask for; none without a batch schedule.

    Raises:
        InputError: as `batch_schedule`.
    """
    rule = batch.batch_schedule
    if rule is None:
        return ()
    largest = batch.max_batch_size
    if largest is not None and largest > num_samples:
        say(f"--max-batch-size {largest} is above the training set's {num_samples} samples: those.")
        largest = num_samples
    return batch_schedule(
        rule,
        global_batch_size=min(batch.first_size, num_samples),
        epochs=rate.epochs,
        num_samples=num_samples,
        milestones=milestones(rate.milestones, rule=rule, epochs=rate.epochs),
        factors=batch.factor[0] if len(batch.factor) == 1 else batch.factor or None,
        max_batch_size=largest,
        past_max=batch.past_max,
        growth=batch.growth,
        lr_growth=batch.lr_growth,
        first_epoch=batch.first_epoch,
        batch_sizes=tuple(int(b) if b.is_integer() else b for b in batch.batch_sizes),  # type: ignore[misc]
        lr_factors=batch.lr_factors,
    )


def milestones(
    given: Sequence[float] | None, *, rule: str | None, epochs: float
) -> tuple[float, ...]:
    """The milestones asked for; under a batch schedule that has them, the published ones.

    >>> milestones((), rule="bsi", epochs=30), milestones((), rule="steady", epochs=30)
    ((10, 19, 25), ())
    """
    if given or rule in (None, "steady", "instant"):
        return tuple(given or ())
    return default_milestones(epochs)


def default_milestones(epochs: float) -> tuple[int, ...]:
    """The starts of epochs 60, 120 and 160 of 200 (59, 119 and 159 done), in proportion.

    Raises:
        InputError: a run so short that two of them would be one, or one the run's start.

    Source: a thesis on large and increasing batch sizes, chapters 3 to 5.

    >>> default_milestones(200), default_milestones(30)
    ((60, 120, 160), (10, 19, 25))
    """
    check_number("epochs", epochs)
    found = tuple(1 + round((epoch - 1) / 200 * epochs) for epoch in MILESTONES)
    if len({1, *found}) < 4:
        raise InputError(
            f"epochs={epochs:g} is too short for milestones at {MILESTONES} of 200, in proportion: "
            "each is the start of an epoch of its own, after the first. Use --milestones, such as "
            "2, or --epochs 4 or more."
        )
    return found


def check_growth(batch: BatchOptions, rate: RateOptions, *, noise_scale: str) -> None:
    """Stop at settings of a growing batch that do not go together.

    Raises:
        InputError: in the names of the flags.
    """
    if batch.follows_noise:
        _check_auto(batch, noise_scale=noise_scale)
    elif batch.batch_schedule is not None and rate.schedule in ("step", "multistep"):
        raise InputError(
            f"--schedule {rate.schedule} with --batch-schedule {batch.batch_schedule}: both change "
            "the rate at milestones. Use --batch-schedule lrd (the rate falls) or mixed, or "
            "--schedule cosine."
        )


def _check_auto(batch: BatchOptions, *, noise_scale: str) -> None:
    low, high = batch.min_batch_size, batch.max_batch_size
    if low is None or high is None or not 0 < low <= high:
        raise InputError(
            f"--global-batch-size auto with --min-batch-size {low} and --max-batch-size {high}: it "
            "grows from the one to the other, so both are needed. Use --min-batch-size 256 "
            "--max-batch-size 8192, say."
        )
    if batch.batch_schedule is not None:
        raise InputError(
            f"--batch-schedule {batch.batch_schedule} with --global-batch-size auto: two would say "
            "how the batch grows. Leave one out."
        )
    if noise_scale == "none" and batch.batch_decisions is None:
        raise InputError(
            "--noise-scale none with --global-batch-size auto: the batch follows what is measured. "
            "Leave --noise-scale out."
        )
    if batch.last_update == "drop":
        raise InputError(
            "--last-update drop with --global-batch-size auto: every size would leave out other "
            "samples. Use keep or wrap."
        )


def largest(batch: BatchOptions, phases: Sequence[Phase]) -> int:
    """The largest batch that a run may come to."""
    if batch.follows_noise and batch.max_batch_size is not None:
        return batch.max_batch_size
    return max([batch.first_size, *(phase.global_batch_size for phase in phases)])


def factor_of(phases: Sequence[Phase], *, samples_per_epoch: int) -> Schedule:
    """The factor of the learning rate in the phase that `samples_seen` lies in."""
    starts = [((phase.epoch - 1) * samples_per_epoch, phase.lr_factor) for phase in phases]
    return lambda samples_seen: [f for start, f in starts if start <= samples_seen][-1]


def factor_by_rule(loader: Any, *, rule: str, exponent: float | None) -> Schedule:
    """The factor of the learning rate where the batch grows as the run decides: the rule's.

    Args:
        loader: whose `stream` knows the sizes so far.
        rule: its name, from the first size to the one that `samples_seen` lies in.
        exponent: of the rule "power".
    """

    def factor(samples_seen: float) -> float:
        stream = loader.stream
        size = stream.size_in(int(samples_seen // stream.samples_per_epoch))
        # k counts, whatever batch the rate is stated for
        return rule_named(rule).scaled(
            1.0,
            base_batch_size=stream.global_batch_size,
            global_batch_size=size,
            exponent=exponent,
        )

    return factor


def explain(phases: Sequence[Phase], *, stream: UpdateStream, epochs: float, lr: float) -> str:
    """A line a phase: from which epoch on, how many samples, at which rate, how many updates."""
    counts = phase_updates(
        phases, epochs=epochs, num_samples=stream.num_samples, last_update=stream.last_update
    )
    rows = [
        f"  from epoch {phase.epoch}: {phase.global_batch_size} samples an update, "
        f"lr {phase.lr(lr):.6g}, {count} updates"
        for phase, count in zip(phases, counts, strict=True)
    ]
    return "\n".join(["batch schedule:", *rows])
