"""Settings that can be used: ranges, pairs that contradict, and options that nothing would read."""

from __future__ import annotations

import math
from typing import NewType

import torch

from lbaccel.data.images import ImageArray
from lbaccel.data.sources import Source
from lbaccel.errors import InputError
from lbaccel.optim.scaling import is_measured
from lbaccel.optim.trained import FREEZES_NORM
from lbaccel.recipe.artifacts import check_artifacts
from lbaccel.recipe.bounds import Bounded, BoundedList, Unfit
from lbaccel.recipe.growth import check_growth
from lbaccel.recipe.measured import follows_noise
from lbaccel.recipe.model_arguments import check_arguments
from lbaccel.recipe.options import OPTIONS, Settings, is_read
from lbaccel.recipe.options_data import DataOptions
from lbaccel.recipe.options_training import RateOptions
from lbaccel.recipe.rate import check_reference, check_scaling
from lbaccel.recipe.values import Option, flag_of, shown
from lbaccel.runs.other_trackers import check_tracker
from lbaccel.update.memory.budget import parse_memory

Checked = NewType("Checked", Settings)
"""Settings that `checked` let pass."""


def checked(settings: Settings) -> Checked:
    """The same settings, where their numbers can be used at all and go together.

    Raises:
        InputError: they can't, in the names of the flags.
    """
    check_growth(settings.batch, settings.rate, noise_scale=settings.run.noise_scale)
    _check_ranges(settings)
    unfitted = settings.rate.max_minutes is not None and settings.origin("epochs") == "default"
    _check_schedule(settings.rate, ends=not unfitted)
    check_scaling(settings.rate, settings.batch, noise_scale=settings.run.noise_scale)
    _check_repeats(settings)
    _check_offload(settings)
    if settings.batch.memory is not None:
        parse_memory(settings.batch.memory)
    if settings.data.cache_images is not None:
        parse_memory(settings.data.cache_images, name="--cache-images")
        _check_kept(settings.data, settings.data.cache_images)
    for tracker in settings.run.log_with:
        check_tracker(tracker, where="--log-with")
    check_artifacts(settings.run)
    check_arguments(settings)
    if settings.batch.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU: there is none. Use bf16 or fp32.")
    if settings.run.resume is None:  # a run of before may hold what is refused now
        _check_length(settings)
        check_read(settings)
    return Checked(settings)


def _check_repeats(s: Settings) -> None:
    """Stop where the noise is to be measured, and the samples of an update are not independent."""
    if s.data.aug_repeats == 1:
        return
    asked = follows_noise(s.batch, s.rate)
    if asked is None and s.batch.follows_noise:
        asked = "--global-batch-size auto"
    if asked is None and s.run.noise_scale not in ("auto", "none"):
        asked = f"--noise-scale {s.run.noise_scale}"
    if asked is not None:
        raise InputError(
            f"--aug-repeats {s.data.aug_repeats} with {asked}: the noise is measured between "
            "micro-batches of independent samples, and copies of an image are none. Leave one of "
            "them out."
        )


def _check_kept(data: DataOptions, size: str) -> None:
    """Stop where decoded images are to be kept, and each crop needs another size of them."""
    if data.decoder == "draft":
        raise InputError(
            f"--decoder draft with --cache-images {size}: draft decodes an image at another size "
            "for each crop, so there is no one image to keep. Leave out --cache-images, or use "
            "--decoder fast in a new run, which keeps images in their whole size."
        )


def _check_offload(s: Settings) -> None:
    """Stop at an offload beside what decides itself what a backward pass keeps."""
    if s.batch.activation_offload == "none":
        return
    flag, reason = f"--activation-offload {s.batch.activation_offload}", ""
    if s.batch.compile:
        reason = "--compile: torch.compile decides itself what a backward pass keeps"
    elif s.batch.activation_checkpointing == "full":
        reason = "--activation-checkpointing full: every block is recomputed, and keeps nothing"
    if reason:
        raise InputError(f"{flag} with {reason}. Leave one of them out.")


def check_read(settings: Settings) -> None:
    """Stop at an option that was given and that nothing would read.

    Raises:
        InputError: with what stands against it.
    """
    named = settings.origin("base_batch_size") != "default"
    check_reference(settings.rate, given=named)
    for name, row in OPTIONS.items():
        if name not in settings.given or settings.value(name) in row.neutral:
            continue
        if not is_read(row, settings):
            raise InputError(_unread(row, settings))
    data = settings.data
    if "color_jitter" in settings.given and data.auto_augment and "3a" not in data.auto_augment:
        raise InputError(
            f"--auto-augment {data.auto_augment} takes the place of timm's colour jitter, so "
            f"nothing reads --color-jitter {shown(data.color_jitter)}. Leave one of them out."
        )
    if data.auto_augment and data.decoder not in (None, "pillow"):
        raise InputError(
            f"--decoder {data.decoder} with --auto-augment {data.auto_augment}: timm's policies "
            "work on Pillow's images, one at a time. Use --decoder pillow, or leave one of them "
            "out."
        )


def check_read_from_data(settings: Settings, source: Source) -> None:
    """Stop at an option that was given and that these images leave unread.

    Raises:
        InputError: a share to hold out beside a validation set of their own; a crop in evaluation,
            or what timm's training transform alone has, for images in memory; padding for others.
    """
    reasons = {}
    if not source.held_out:
        reasons["val_fraction"] = "has a validation set of its own"
    if isinstance(source.train, ImageArray):
        reasons["crop_pct"] = "is held in memory, where images are evaluated whole"
        reasons |= dict.fromkeys(("decoder", "cache_images"), "is held in memory, decoded once")
        if settings.data.auto_augment is None:
            shifted = "is held in memory, where a crop is a shift and nothing else is drawn"
            reasons |= dict.fromkeys(("scale", "ratio", "color_jitter", "random_erasing"), shifted)
    else:
        reasons["crop_padding_mode"] = "is read from files, whose random crops lie inside the image"
    for name, reason in reasons.items():
        if name in settings.given and settings.value(name) not in OPTIONS[name].neutral:
            flag, value = flag_of(name), shown(settings.value(name))
            raise InputError(
                f"--data {settings.data.data} {reason}, so nothing reads {flag} {value}. "
                "Leave it out."
            )


def check_read_by_norm(settings: Settings, has_batch_norm: bool) -> None:
    """Stop at what is given on BatchNorm's statistics where none move.

    Raises:
        InputError: it was, and there is no BatchNorm, or it is frozen.
    """
    if "bn_statistics" in settings.given and not has_batch_norm:
        raise InputError(
            f"--bn-statistics {settings.batch.bn_statistics}: {settings.model.model} has no "
            "BatchNorm. Leave it out."
        )
    measured = settings.optimizer.ema_norm
    frozen = settings.batch.norm_batch_size == "frozen" or settings.model.train in FREEZES_NORM
    if "ema_norm" in settings.given and measured != "average" and (frozen or not has_batch_norm):
        reason = "BatchNorm is frozen" if has_batch_norm else "there is no BatchNorm"
        raise InputError(f"--ema-norm {measured}: {reason}, so nothing is measured. Leave it out.")
    if settings.model.train in FREEZES_NORM:
        for name in {"bn_statistics", "bn_momentum"} & settings.given:
            raise InputError(
                f"--train {settings.model.train} freezes BatchNorm's statistics, so nothing reads "
                f"{flag_of(name)} {shown(settings.value(name))}. Leave it out."
            )


def _unread(row: Option, settings: Settings) -> str:
    first = row.reads_with[0]
    other, value = settings.value(first.other), settings.value(row.name)
    where = f"{flag_of(first.other)} {shown(other)}" if other is not None else "this recipe"
    it = "them" if isinstance(value, tuple) and len(value) > 1 else "it"
    use = first.use if len(row.reads_with) == 1 else " or ".join(_advice(row))
    return f"{where} does not read {row.flag} {shown(value)}. {use}, or leave {it} out."


def _advice(row: Option) -> list[str]:
    first, *others = (r.use for r in row.reads_with)
    return [first, *(use[:1].lower() + use[1:] for use in others)]


def _check_ranges(s: Settings) -> None:
    """The rule of each row, for a value that came past its text too."""
    for row in OPTIONS.values():
        value = s.value(row.name)
        if value is None or not isinstance(row.parse, (Bounded, BoundedList)):
            continue
        try:
            row.parse(value)
        except Unfit as error:
            raise InputError(f"{row.flag}={error}.") from None
    for name in ("mean", "std"):
        value = s.value(name)
        if value is not None and s.run.resume is None:  # a run of before may have others
            _check_normalisation(name, value)
    _check_crops(s.data)
    if s.run.monitor.endswith("_ema") and s.optimizer.ema_decay is None:
        raise InputError(
            f"--monitor {s.run.monitor} is of the average of the weights, and there is none. Add "
            "--ema-decay, such as 0.999."
        )


def _check_length(s: Settings) -> None:
    """Stop at two lengths, and at a length that a measurement in the middle of the run decides."""
    if s.rate.max_minutes is None:
        return
    flag = f"--max-minutes {s.rate.max_minutes:g}"
    for name in ("epochs", "max_updates"):
        if name in s.given:
            raise InputError(
                f"{flag} finds the number of epochs that fit in the time, and {flag_of(name)} "
                f"{shown(s.value(name))} states the length. Leave one of them out; --max-hours "
                "stops a run of --epochs in time."
            )
    moving = {
        f"--batch-schedule {s.batch.batch_schedule}": s.batch.batch_schedule is not None,
        "--global-batch-size auto": s.batch.follows_noise,
        f"--lr-scaling {s.rate.lr_scaling}": is_measured(s.rate.lr_scaling),
    }
    for other, holds in moving.items():
        if holds:
            raise InputError(
                f"{flag} times the first updates, and under {other} later ones take another time. "
                "Use --epochs, and --max-hours to stop in time."
            )


def _check_crops(data: DataOptions) -> None:
    for name, value, most in (("scale", data.scale, 1.0), ("ratio", data.ratio, math.inf)):
        if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1] <= most):
            of = "of the area, such as 0.35 1" if name == "scale" else "such as 0.75 1.3333"
            raise InputError(
                f"{flag_of(name)} {shown(value)} must be two numbers above 0, the smaller first"
                f"{', at most 1' if name == 'scale' else ''}: {of}."
            )


def _check_normalisation(name: str, value: tuple[float, ...]) -> None:
    """Pixels are 0..1 when the mean is taken off and the deviation divides them, as in timm."""
    least = "from 0" if name == "mean" else "above 0"
    if all(0 <= x <= 1 and (x > 0 or name == "mean") for x in value):
        return
    typed = " ".join(f"{x:g}" for x in value)
    hint = ""
    if all(0 <= x <= 255 for x in value) and max(value) > 1:
        hint = f" Of 0..255 they are {flag_of(name)} {' '.join(f'{x / 255:.3g}' for x in value)}."
    raise InputError(
        f"{flag_of(name)} {typed} must be numbers {least} to 1, for pixels of 0..1.{hint}"
    )


def _check_schedule(rate: RateOptions, *, ends: bool) -> None:
    """The same that `make_schedule` would refuse, in the names of the flags."""
    if ends and rate.warmup_epochs is not None and rate.warmup_epochs > rate.epochs:
        raise InputError(
            f"--warmup-epochs {rate.warmup_epochs:g} is longer than the run of --epochs "
            f"{rate.epochs:g}: the warmup must end within it. Use --warmup-epochs <= "
            f"{rate.epochs:g}, or --epochs >= {rate.warmup_epochs:g}."
        )
    flag = f"--schedule {rate.schedule}"
    if rate.schedule == "step" and len(rate.milestones) != 1:
        raise InputError(f"{flag} needs one --milestones, its period in epochs: --milestones 50.")
    if rate.schedule == "multistep" and not rate.milestones:
        raise InputError(f"{flag} needs --milestones in epochs, such as --milestones 30 60 80.")
