"""Warmup and decay as pure functions of samples seen (no torch).

Every function takes `samples_seen`, the samples consumed over all ranks at the START of an update,
and returns the multiplier of the peak learning rate: 1.0 is the scaled learning rate. Counted in
samples, "5 epochs of warmup" are the same samples whatever the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from lbaccel.batch.duration import Duration, all_units
from lbaccel.errors import InputError, check_choice, check_number

Schedule = Callable[[float], float]
DECAYS = ("constant", "cosine", "step", "multistep")
WARMUPS = ("none", "gradual", "constant", "stairs")


def gradual_warmup(samples_seen: float, *, warmup_samples: float, start: float) -> float:
    """Straight line from `start` at 0 to 1: `start + (1 - start) * samples_seen / warmup_samples`.

    Raises:
        InputError: a negative or infinite number, or `start` above 1.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 2.2, gradual warmup.

    >>> [gradual_warmup(s, warmup_samples=100, start=0.5) for s in (0, 50, 100, 101)]
    [0.5, 0.75, 1.0, 1.0]
    """
    _check_warmup(samples_seen, warmup_samples, start)
    if samples_seen >= warmup_samples:
        return 1.0
    return start + (1.0 - start) * (samples_seen / warmup_samples)


def constant_warmup(samples_seen: float, *, warmup_samples: float, start: float) -> float:
    """Keep `start` as long as `samples_seen < warmup_samples`, then 1.

    Raises:
        InputError: a negative or infinite number, or `start` above 1.

    Source: Goyal et al. 2017, section 2.2, constant warmup (after He et al. 2016, section 4.2).

    >>> [constant_warmup(s, warmup_samples=100, start=0.5) for s in (0, 99, 100)]
    [0.5, 0.5, 1.0]
    """
    _check_warmup(samples_seen, warmup_samples, start)
    return 1.0 if samples_seen >= warmup_samples else start


def stairs_warmup(samples_seen: float, *, warmup_samples: float, epoch_samples: float) -> float:
    """Epoch e = 0, 1, ... of the E warmup epochs has `(e + 1) / E`, then 1.

    e = floor(`samples_seen` / `epoch_samples`), E = ceil(`warmup_samples` / `epoch_samples`).

    Raises:
        InputError: a negative or infinite number, or `epoch_samples` of 0.

    Source: "On the large-batch training of CIFAR-10" (EPFL report), with E = 10.

    >>> [stairs_warmup(s, warmup_samples=40, epoch_samples=10) for s in (0, 9, 10, 30, 40)]
    [0.25, 0.25, 0.5, 1.0, 1.0]
    """
    _check_warmup(samples_seen, warmup_samples, 0.0)
    check_number("epoch_samples", epoch_samples)
    if samples_seen >= warmup_samples:
        return 1.0
    return int(samples_seen // epoch_samples + 1) / math.ceil(warmup_samples / epoch_samples)


def constant(samples_seen: float) -> float:
    """No decay: 1 always.

    Raises:
        InputError: `samples_seen` negative or infinite.

    >>> constant(1_000)
    1.0
    """
    check_number("samples_seen", samples_seen, zero=True)
    return 1.0


def cosine(samples_seen: float, *, total_samples: float, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final`: `final + (1 - final) * (1 + cos(pi * s / S)) / 2`.

    s = `samples_seen`, S = `total_samples`; exactly `final` at S and after.

    Raises:
        InputError: a negative or infinite number, or `final` above 1.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, one period.

    >>> [round(cosine(s, total_samples=100, final=0.1), 9) for s in (0, 50, 100, 101)]
    [1.0, 0.55, 0.1, 0.1]
    """
    check_number("samples_seen", samples_seen, zero=True)
    check_number("total_samples", total_samples, zero=True)
    check_number("final", final, zero=True, at_most=1.0)
    if samples_seen >= total_samples:
        return float(final)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * samples_seen / total_samples))


def step_decay(samples_seen: float, *, every: float, gamma: float) -> float:
    """Multiply by `gamma` every `every` samples: `gamma ** floor(samples_seen / every)`.

    Raises:
        InputError: a negative or infinite number, or `every` or `gamma` of 0.

    Source: "On the large-batch training of CIFAR-10" (EPFL report): a tenth every 50 epochs.

    >>> [step_decay(s, every=50, gamma=0.5) for s in (0, 49, 50, 100)]
    [1.0, 1.0, 0.5, 0.25]
    """
    check_number("samples_seen", samples_seen, zero=True)
    check_number("every", every)
    check_number("gamma", gamma)
    return float(gamma ** int(samples_seen // every))


def multi_step(samples_seen: float, *, milestones: Sequence[float], gamma: float) -> float:
    """Multiply by `gamma` at each milestone: `gamma ** (number of milestones <= samples_seen)`.

    Raises:
        InputError: a negative or infinite number, or `gamma` of 0.

    Source: Goyal et al. 2017, section 5.1 (a tenth at epochs 30, 60 and 80).

    >>> [multi_step(s, milestones=(30, 60), gamma=0.5) for s in (29, 30, 60)]
    [1.0, 0.5, 0.25]
    """
    check_number("samples_seen", samples_seen, zero=True)
    check_number("gamma", gamma)
    for milestone in milestones:
        check_number("milestone", milestone, zero=True)
    return float(gamma ** sum(samples_seen >= m for m in milestones))


def warmup_start(base_lr: float, peak_lr: float, *, start: str | float = "reference") -> float:
    """The multiplier that warmup starts from, `min(base_lr, peak_lr) / peak_lr` by default.

    Args:
        base_lr: learning rate of the reference batch.
        peak_lr: scaled learning rate.
        start: "reference" (Goyal's: from eta to k eta; 1 where the scaled rate is the smaller),
            "zero", or a learning rate from 0 to `peak_lr`.

    Raises:
        InputError: another word, a learning rate above `peak_lr`, or a rate that is not positive.

    Source: Goyal et al. 2017, section 2.2.

    >>> warmup_start(0.1, 0.4), warmup_start(0.1, 0.05), warmup_start(0.1, 0.4, start=0.2)
    (0.25, 1.0, 0.5)
    """
    check_number("base_lr", base_lr)
    check_number("peak_lr", peak_lr)
    if isinstance(start, str):
        check_choice("start", start, choices=("reference", "zero"))
        return 0.0 if start == "zero" else min(base_lr, peak_lr) / peak_lr
    check_number("start", start, zero=True, at_most=peak_lr)
    return start / peak_lr


def make_schedule(
    *,
    total: Duration,
    base_lr: float,
    peak_lr: float,
    global_batch_size: int,
    num_samples: int,
    decay: str = "cosine",
    warmup: str = "gradual",
    warmup_duration: Duration | None = None,
    start: str | float = "reference",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    final_lr: float = 0.0,
) -> Schedule:
    """Warmup, then decay: a function from samples seen to the multiplier of `peak_lr`.

    Args:
        total: length of the run; its last fraction of a sample is left out.
        base_lr: learning rate of the reference batch, where warmup starts by default.
        peak_lr: scaled learning rate, what the multiplier 1 stands for.
        global_batch_size: samples of an update.
        num_samples: samples that one epoch consumes (see `Duration.to_samples`).
        decay: "cosine" runs from the end of the warmup to the end of the run; "step" has a period
            of `milestones[0]` epochs, counted from the end of the warmup (see `step_decay`);
            "multistep" has `milestones` in epochs of the whole run (Goyal's 30, 60, 80), the first
            not before the end of the warmup; "constant".
        warmup: "gradual", "constant", "stairs" (one step an epoch) or "none".
        warmup_duration: length of the warmup; not read where `warmup` is "none".
        start: where "gradual" and "constant" start (see `warmup_start`).
        milestones: in epochs, for "step" and "multistep".
        gamma: factor at each step, for "step" and "multistep".
        final_lr: learning rate at the end of the run, for "cosine".

    Raises:
        InputError: an unknown name, a warmup longer than the run or past the first milestone, or a
            setting that the chosen warmup or decay does not read.

    Source: the functions above.

    >>> schedule = make_schedule(
    ...     total=Duration(epochs=10), warmup_duration=Duration(epochs=2), base_lr=0.1,
    ...     peak_lr=0.4, global_batch_size=1024, num_samples=50_000)
    >>> [round(0.4 * schedule(50_000 * epoch), 9) for epoch in (0, 1, 2, 6, 10)]
    [0.1, 0.25, 0.4, 0.2, 0.0]
    """
    check_choice("decay", decay, choices=DECAYS)
    check_choice("warmup", warmup, choices=WARMUPS)
    sizes = {"global_batch_size": global_batch_size, "num_samples": num_samples}
    if warmup == "none":
        warmup_duration = Duration(samples=0)
    elif warmup_duration is None:
        raise InputError(
            f"warmup={warmup!r} has no warmup_duration. "
            "Use warmup_duration=Duration(epochs=5), or warmup='none'."
        )
    warmup_exact, total_exact = (d.exact_samples(**sizes) for d in (warmup_duration, total))
    if warmup_exact > total_exact:
        lengths = [all_units(x, **sizes) for x in (warmup_exact, total_exact)]
        raise InputError(
            f"warmup_duration of {lengths[0]} is longer than the run of {lengths[1]}: warmup must "
            f"end within the run. Use a warmup of at most {total}, or a run of at least "
            f"{warmup_duration}."
        )
    first = warmup_start(base_lr, peak_lr, start=start)
    if warmup in ("none", "stairs") and start != "reference":
        raise InputError(f"warmup={warmup!r} does not read start={start!r}. Use warmup='gradual'.")
    check_number("final_lr", final_lr, zero=True, at_most=peak_lr)
    _check_decay(decay, milestones=milestones, gamma=gamma, final_lr=final_lr)

    warmup_samples = float(warmup_exact)
    cosine_samples = max(0.0, math.floor(total_exact) - warmup_samples)
    steps = [Duration(epochs=m).exact_samples(**sizes) for m in milestones]
    if decay == "multistep" and min(steps) < warmup_exact:
        raise InputError(
            f"warmup_duration of {all_units(warmup_exact, **sizes)} ends after the first "
            f"milestone, epoch {min(milestones):g}: the learning rate would fall before it has "
            f"risen. Use a warmup of at most {min(milestones):g} epochs, or later milestones."
        )
    boundaries = [float(s) for s in steps]

    def schedule(samples_seen: float) -> float:
        check_number("samples_seen", samples_seen, zero=True)
        if samples_seen < warmup_samples:
            if warmup == "stairs":
                return stairs_warmup(
                    samples_seen, warmup_samples=warmup_samples, epoch_samples=num_samples
                )
            rise = gradual_warmup if warmup == "gradual" else constant_warmup
            return rise(samples_seen, warmup_samples=warmup_samples, start=first)
        if decay == "cosine":
            past = samples_seen - warmup_samples
            return cosine(past, total_samples=cosine_samples, final=final_lr / peak_lr)
        if decay == "step":
            # as fractions: 0.3 epochs of warmup and a period of 0.7 meet the epoch's end exactly
            number = (Fraction(samples_seen) - warmup_exact) // steps[0]
            return float(gamma**number)
        if decay == "multistep":
            return multi_step(samples_seen, milestones=boundaries, gamma=gamma)
        return constant(samples_seen)

    return schedule


def product(schedule: Schedule, factor: Schedule) -> Schedule:
    """Both multiplied.

    >>> product(lambda s: 0.5, lambda s: 2.0 if s else 1.0)(10)
    1.0
    """
    return lambda samples_seen: schedule(samples_seen) * factor(samples_seen)


def extend_schedule(
    schedule: Schedule, *, how: str, before: float, after: float, last: float, final: float = 0.0
) -> Schedule:
    """Go on past the end of a schedule that ends: its values up to `before` stay as they are.

    "restart": a new cosine from 1 at `before` to `final` at `after` (Loshchilov and Hutter 2017, a
    warm restart); "constant": what the last update of the schedule had.

    Args:
        schedule: the one that ends at `before`.
        before: samples at its end.
        after: samples at the new end.
        last: samples seen at the start of its last update.
        final: multiplier at the new end, for "restart".

    Raises:
        InputError: another word for `how`.

    >>> ended = lambda s: cosine(s, total_samples=100)
    >>> longer = extend_schedule(ended, how="restart", before=100, after=200, last=90)
    >>> [round(longer(s), 9) for s in (0, 50, 100, 150, 200)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_choice("how", how, choices=("restart", "constant"))

    def extended(samples_seen: float) -> float:
        if samples_seen < before:
            return schedule(samples_seen)
        if how == "constant":
            return schedule(last)
        return cosine(samples_seen - before, total_samples=after - before, final=final)

    return extended


def _check_decay(decay: str, *, milestones: Sequence[float], gamma: float, final_lr: float) -> None:
    """Stop at settings that `decay` needs and lacks, or has and does not read."""
    check_number("gamma", gamma)
    for milestone in milestones:
        check_number("milestone", milestone)
    given = f"decay={decay!r} has milestones={tuple(milestones)}"
    if decay == "step" and len(milestones) != 1:
        raise InputError(f"{given}. Use one, its period in epochs, such as (50,).")
    if decay == "multistep" and not milestones:
        raise InputError(f"{given}. Use milestones in epochs, such as (30, 60, 80).")
    if decay in ("constant", "cosine") and milestones:
        raise InputError(f"{given} and does not read them. Use decay='multistep'.")
    if decay != "cosine" and final_lr:
        raise InputError(f"decay={decay!r} does not read final_lr={final_lr}. Use decay='cosine'.")


def _check_warmup(samples_seen: float, warmup_samples: float, start: float) -> None:
    check_number("samples_seen", samples_seen, zero=True)
    check_number("warmup_samples", warmup_samples, zero=True)
    check_number("start", start, zero=True, at_most=1.0)
