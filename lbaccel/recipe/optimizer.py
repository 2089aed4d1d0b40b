"""The optimizer and the schedule that the recipe builds from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lbaccel.batch.duration import Duration
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError
from lbaccel.optim.groups import apply_lr_scale
from lbaccel.optim.momentum import correct_momentum
from lbaccel.optim.optimizers import create_optimizer, has_fused_step, notes
from lbaccel.optim.schedules import Schedule, extend_schedule, make_schedule
from lbaccel.recipe.options_training import OptimizerOptions, RateOptions
from lbaccel.recipe.rate import PeakRate

Say = Callable[[str], object]
Extensions = Sequence[tuple[float, str | None]]


def takes_fused_step(options: OptimizerOptions, accelerator: Any, precision: str) -> bool:
    """Whether the optimizer's step is torch's fused one; DeepSpeed and FSDP step in their own."""
    plain = accelerator.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU")
    device_type = accelerator.device.type
    return (
        plain
        and options.fused_optimizer == "auto"
        and has_fused_step(options.optimizer, device_type=device_type, precision=precision)
    )


def build_optimizer(
    options: OptimizerOptions, model: nn.Module, *, rate: PeakRate, fused: bool, say: Say
) -> torch.optim.Optimizer:
    """The optimizer at the peak rate of the global batch."""
    name = options.optimizer.lower()
    optimizer = create_optimizer(
        model,
        name,
        lr=rate.lr,
        weight_decay=rate.weight_decay,
        momentum=options.momentum,
        decay_all=options.decay_all,
        layer_decay=options.layer_decay,
        head_lr_scale=options.head_lr_scale,
        lr_groups=options.lr_groups,
        betas=options.betas,
        eps=options.eps,
        clip_grad_norm=options.clip_grad_norm,
        fused=fused,
    )
    clip = options.clip_grad_norm
    for line in notes(name, decay_all=options.decay_all, clip_grad_norm=clip):
        say(line)
    apply_lr_scale(optimizer)
    if options.momentum_correction:
        held = correct_momentum(optimizer)
        say(f"momentum correction: {'on' if held else f'none, {name} holds no learning rate'}")
    return optimizer


def build_schedule(
    options: RateOptions,
    *,
    rate: PeakRate,
    stream: UpdateStream,
    steps_at: Sequence[float],
    extensions: Extensions = (),
) -> Schedule:
    """The schedule of a run, with every extension that a resume gave it.

    Args:
        options: of the learning rate.
        rate: where it starts and peaks, with its warmup.
        stream: where updates lie.
        steps_at: milestones of the decay; those of a batch schedule are none.
        extensions: pairs (epochs before, how the cosine went on).

    Raises:
        InputError: a cosine is to go on past its end, and `extend` does not say how.
    """
    curve = _Curve(options, rate, stream, tuple(steps_at))
    lengths = [*(before for before, _ in extensions), options.epochs]
    schedule = curve.ending_at(lengths[0])
    for (before, how), after in zip(extensions, lengths[1:], strict=True):
        schedule = curve.extended(schedule, how, before=before, after=after)
    return schedule


@dataclass(frozen=True)
class _Curve:
    """The learning rate over a run of any length."""

    options: RateOptions
    rate: PeakRate
    stream: UpdateStream
    steps_at: tuple[float, ...]

    def end(self, epochs: float) -> int:
        return self.stream.samples_seen(self.stream.num_updates(epochs))

    def ending_at(self, epochs: float) -> Schedule:
        return make_schedule(
            total=Duration(samples=self.end(epochs)),
            base_lr=self.rate.base_lr,
            peak_lr=self.rate.lr,
            global_batch_size=self.stream.global_batch_size,
            num_samples=self.stream.samples_per_epoch,
            decay=self.options.schedule,
            warmup=self.options.warmup,
            warmup_duration=Duration(epochs=self.rate.warmup_epochs),
            start=self.options.warmup_start,
            milestones=self.steps_at,
            gamma=self.options.gamma,
            final_lr=self.options.final_lr,
        )

    def extended(
        self, schedule: Schedule, how: str | None, *, before: float, after: float
    ) -> Schedule:
        last = self.stream.samples_seen(self.stream.num_updates(before) - 1)
        if self.options.schedule != "cosine" or how == "stretch":
            return self.ending_at(after)  # steps and constants do not know the run's end
        if how is None:
            raise InputError(self._choices(schedule, before=before, after=after, last=last))
        return extend_schedule(
            schedule,
            how=how,
            final=self.options.final_lr / self.rate.lr,
            before=self.end(before),
            after=self.end(after),
            last=last,
        )

    def _choices(self, schedule: Schedule, *, before: float, after: float, last: int) -> str:
        peak_lr, here = self.rate.lr, self.end(min(before, after))
        rates = [f(here) * peak_lr for f in (schedule, self.ending_at(after))]
        text = (
            f"--epochs {after:g}: the run's cosine ends at epoch {before:g}, and how the "
            "learning rate goes on is for you to say. Use "
        )
        if after > before:
            text += (
                f"--extend restart (a new cosine from {peak_lr:.4g} at epoch {before:g} to "
                f"{self.options.final_lr:.4g} at {after:g}), --extend constant (stays at "
                f"{schedule(last) * peak_lr:.4g}, that of the last update), or "
            )
        return (
            f"{text}--extend stretch (the cosine of {after:g} epochs from here on: at epoch "
            f"{min(before, after):g} it has {rates[1]:.4g} in place of {rates[0]:.4g})."
        )
