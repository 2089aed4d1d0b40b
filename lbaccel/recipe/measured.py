"""The parts of a run where batch or rate follow a measurement, or updates are dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch.optim import Optimizer

from lbaccel.batch.phases import Phase
from lbaccel.batch.plan import BatchPlan
from lbaccel.batch.stream import UpdateStream
from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import InputError
from lbaccel.noise.auto_batch import AutoBatch, read_decisions
from lbaccel.noise.scale import NoiseScale
from lbaccel.optim.adascale import AdaScale
from lbaccel.optim.scaling import is_measured
from lbaccel.optim.scheduler import AdaScaleLR, lr_scheduler
from lbaccel.optim.schedules import Schedule
from lbaccel.recipe.growth import factor_by_rule, factor_of
from lbaccel.recipe.options import Settings
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_training import RateOptions
from lbaccel.recipe.rate import PeakRate
from lbaccel.recipe.values import shown
from lbaccel.runs.folder import DECISIONS
from lbaccel.update.loss_dropout import LossDropout

Say = Callable[[str], object]


def loss_dropout(
    epochs: Sequence[float],
    stream: UpdateStream | Callable[[], UpdateStream],
    *,
    rate: RateOptions,
) -> LossDropout | None:
    """The part that drops updates between two epochs, if asked for."""
    if not epochs:
        return None
    if len(epochs) != 2 or not all(float(epoch).is_integer() and epoch > 0 for epoch in epochs):
        raise InputError(
            f"--loss-dropout {shown(epochs)}: give the first and the last epoch in which updates "
            "may be dropped, numbered from 1, such as --loss-dropout 3 119."
        )
    if epochs[0] > ceil(rate.epochs) and not is_measured(rate.lr_scaling):  # which runs longer
        raise InputError(
            f"--loss-dropout {epochs[0]:g} {epochs[1]:g} begins after the last epoch of a run of "
            f"--epochs {rate.epochs:g}: nothing would be dropped. Use an earlier one."
        )
    return LossDropout(stream, first_epoch=int(epochs[0]), last_epoch=int(epochs[1]))


def rate_factor(
    batch: BatchOptions, rate: PeakRate, *, phases: Sequence[Phase], loader: UpdateLoader
) -> Schedule | None:
    """The factor of a growing batch on the learning rate; None where the batch stays."""
    if batch.follows_noise:
        return factor_by_rule(loader, rule=rate.rule, exponent=rate.exponent)
    if not phases:
        return None
    return factor_of(phases, samples_per_epoch=loader.stream.samples_per_epoch)


def build_noise_scale(
    s: Settings, loader: UpdateLoader, accelerator: Any, *, searches: bool, say: Say
) -> NoiseScale | None:
    """The measurement of the critical batch; None where `--noise-scale` says so, or auto can't.

    Its averages halve over a tenth of the run.

    Args:
        s: settings of all groups: what is measured has a say in batch and rate.
        loader: of the run.
        accelerator: tells the sharding.
        searches: the micro-batch will be found by trial, so that the plan's is not the last word.
        say: is told why auto does not measure.

    Raises:
        InputError: the batch or the rate is to follow it, and it can't be measured.
    """
    kind, stream, plan = s.run.noise_scale, loader.stream, loader.plan
    if kind == "none":
        return None
    needed = follows_noise(s.batch, s.rate)
    if loader.repeats > 1:
        say("noise scale: not measured, as copies of one image are no independent samples")
        return None
    if plan.norm_batch_size == "global":
        if needed is None and kind == "auto":
            say("noise scale: not measured, as no micro-batch has a gradient of its own")
            return None
        asked = needed or f"--noise-scale {kind}"
        raise InputError(
            f"{asked} with --norm-batch-size global: no micro-batch has a gradient of its own, so "
            "the noise can't be measured. Use --norm-batch-size 32, or leave it out."
        )
    if kind == "auto":
        plugin = accelerator.deepspeed_plugin
        stage = plugin.zero_stage if plugin is not None else 0
        if stage >= 3 or accelerator.distributed_type == DistributedType.FSDP:
            if needed is None:
                return None
            raise InputError(
                f"{needed} under ZeRO-3 and FSDP2: no rank sees a micro-batch's gradient whole, so "
                "the noise can't be measured. Use ZeRO-2 or DDP."
            )
        if needed is None and not searches and _num_units(plan) < 2:
            say("noise scale: not measured, as an update is one micro-batch (it takes two)")
            return None
    if not searches:
        check_measurable(needed, plan)
    if needed is not None:
        say(
            f"{needed}: what is measured depends on its units, which are micro-batches, so another "
            "micro-batch or number of ranks gives another run of the same kind"
        )
    # Here, as it maps more memory than a tight limit on it may leave in the middle of the run.
    import scipy.special  # noqa: F401

    end = stream.samples_seen(stream.num_updates(s.rate.epochs))
    return NoiseScale(
        half_life_samples=end / 10,
        training_set_size=stream.num_samples,
        samples_per_epoch=stream.samples_per_epoch,
        preconditioned=kind == "preconditioned",
    )


def follows_noise(batch: BatchOptions, rate: RateOptions) -> str | None:
    """The setting that can't be without the noise scale, as it is typed."""
    if batch.follows_noise and batch.batch_decisions is None:
        return "--global-batch-size auto"
    return f"--lr-scaling {rate.lr_scaling}" if is_measured(rate.lr_scaling) else None


def check_measurable(needed: str | None, plan: BatchPlan) -> None:
    """Stop where rate or batch follow the noise, and an update has no spread to measure.

    Args:
        needed: from `follows_noise`.
        plan: how an update is cut.

    Raises:
        InputError: an update is one micro-batch.
    """
    if needed is not None and _num_units(plan) < 2:
        raise InputError(
            f"{needed} measures the spread of an update's micro-batches, and "
            f"{plan.global_batch_size} samples are one of {plan.micro_batch_size}. Use "
            f"--micro-batch-size <= {max(1, plan.global_batch_size // 2)}."
        )


def _num_units(plan: BatchPlan) -> int:
    parts = [m for rank in range(plan.world_size) for m in plan.partition(rank)]
    return sum(not m.is_filler for m in parts)


def build_auto_batch(
    batch: BatchOptions, loader: UpdateLoader, noise_scale: NoiseScale | None
) -> AutoBatch | None:
    """The part that grows the batch as the run goes; None without `--global-batch-size auto`."""
    if not batch.follows_noise or batch.max_batch_size is None:
        return None
    replay, most = None, batch.max_batch_size
    if batch.batch_decisions is not None:
        path = Path(batch.batch_decisions)
        file = path / DECISIONS if path.is_dir() else path
        replay = read_decisions(file, first=loader.stream.global_batch_size)
        largest = max([decision.after for decision in replay], default=0)
        if largest > most:
            raise InputError(
                f"--batch-decisions {path} grow to {largest} samples, above --max-batch-size "
                f"{most}. Use --max-batch-size {largest}, or another file."
            )
    return AutoBatch(
        loader,
        largest=min(most, loader.stream.num_samples),
        average=None if noise_scale is None else noise_scale.average,
        replay=replay,
    )


def build_scheduler(
    rate: RateOptions,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    loader: UpdateLoader,
    noise_scale: NoiseScale | None,
) -> Any:
    """The part that moves the learning rate after each update."""

    def size(update: int) -> int:
        return loader.stream.span(update)[1]

    if not is_measured(rate.lr_scaling):
        return lr_scheduler(optimizer, schedule, samples_per_update=size)
    assert noise_scale is not None
    stream = loader.stream
    return AdaScaleLR(
        optimizer,
        schedule,
        rule=AdaScale(rate.base_batch_size),
        averages=noise_scale.average,
        sizes=size,
        total_samples=stream.samples_seen(stream.num_updates(rate.epochs)),
    )
