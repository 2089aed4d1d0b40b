"""The recipe's learning rate, from its settings: rule, peak, warmup, weight decay (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbaccel.errors import InputError, check_number
from lbaccel.optim.defaults import default_base_lr, default_warmup, default_weight_decay
from lbaccel.optim.rule import Rule
from lbaccel.optim.scaling import choose_rule, find_rule, reference_batch, rule_named
from lbaccel.recipe.options import Settings
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_training import OptimizerOptions, RateOptions


@dataclass(frozen=True)
class PeakRate:
    """The rate at the peak that settings and a global batch make, and all that goes with it."""

    lr: float
    base_lr: float
    base_batch_size: int
    rule: str
    exponent: float | None
    warmup_epochs: float  # after LEGW's factor
    asked_warmup_epochs: float
    weight_decay: float
    sentence: str

    def as_asked(self) -> dict[str, Any]:
        """Settings with which a run scales nothing twice, by name."""
        return {
            "base_lr": self.base_lr,
            "base_batch_size": self.base_batch_size,
            "lr_scaling": self.rule,
            "weight_decay": self.weight_decay,
            "warmup_epochs": self.asked_warmup_epochs,
        }


def check_scaling(rate: RateOptions, batch: BatchOptions, *, noise_scale: str) -> None:
    """Stop at a rule without the settings that it needs.

    Raises:
        InputError: in the names of the flags.
    """
    rule = find_rule(rate.lr_scaling)  # none under auto
    exponent = rate.lr_exponent
    if exponent is not None:
        check_number("--lr-exponent", exponent, zero=True)
    if rule is None:
        return
    if "lr_exponent" in rule.reads and exponent is None:
        raise InputError(
            f"--lr-scaling {rule.name} needs its exponent. Use --lr-exponent 0.7 (1 is linear, "
            "0.5 sqrt; a fit to ten tuned rates of a Wide-ResNet 16-4 on CIFAR-10 gives 0.69)."
        )
    if rule.measured:
        _check_measured(rule.name, rate, batch, noise_scale=noise_scale)
    if rule.warmup_times_k and (rate.warmup == "none" or rate.warmup_epochs is None):
        raise InputError(
            f"--lr-scaling {rule.name} multiplies the warmup of the base batch by k, so it must be "
            "given: --warmup-epochs 0.5 (epochs at --base-batch-size), with --warmup gradual."
        )


def check_reference(rate: RateOptions, *, given: bool) -> None:
    """Stop at a base batch that was given beside a rule that names another, "per-N".

    Raises:
        InputError: in the names of the flags.
    """
    rule = find_rule(rate.lr_scaling)
    if not given or rule is None or rule.samples in (None, rate.base_batch_size):
        return
    raise InputError(
        f"--lr-scaling {rule.name} states --base-lr per {rule.samples} samples, and "
        f"--base-batch-size {rate.base_batch_size} says otherwise. Leave it out, or use "
        "--lr-scaling linear."
    )


def _check_measured(name: str, rate: RateOptions, batch: BatchOptions, *, noise_scale: str) -> None:
    growing = batch.batch_schedule or ("auto" if batch.follows_noise else None)
    if growing is not None:
        raise InputError(
            f"--lr-scaling {name} with a batch that changes ({growing}): both say how the rate "
            "goes with the batch. Leave one out."
        )
    _check_gain(name, global_batch_size=batch.first_size, base_batch_size=rate.base_batch_size)
    if noise_scale == "none":
        raise InputError(
            f"--lr-scaling {name} with --noise-scale none: the gain is measured. Leave "
            "--noise-scale out."
        )


def _check_gain(name: str, *, global_batch_size: int, base_batch_size: int) -> None:
    if global_batch_size <= base_batch_size:
        raise InputError(
            f"--lr-scaling {name} with --global-batch-size {global_batch_size}: its gain is "
            f"over --base-batch-size {base_batch_size}, which must be smaller."
        )


def peak_rate(
    rate: RateOptions,
    optimizer: OptimizerOptions,
    *,
    pretrained: bool,
    frozen_norm: bool,
    global_batch_size: int,
) -> PeakRate:
    """The learning rate of the recipe at a global batch, with its defaults.

    Raises:
        InputError: see `Rule.scaled`; a measured gain over a batch that is not smaller; a warmup
            times k beyond the run.
    """
    name, why = choose_rule(optimizer.optimizer.lower())
    if rate.lr_scaling != "auto":
        name, why = rate.lr_scaling, "as asked"
    rule, base_lr, weight_decay = rule_named(name), rate.base_lr, optimizer.weight_decay
    if base_lr is None:
        base_lr = default_base_lr(
            optimizer.optimizer, pretrained=pretrained, frozen_norm=frozen_norm
        )
    if weight_decay is None:
        weight_decay = default_weight_decay(optimizer.optimizer)
    sizes = {
        "base_batch_size": reference_batch(name, rate.base_batch_size),
        "global_batch_size": global_batch_size,
    }
    asked = rate.warmup_epochs
    if asked is None:
        asked = 0.0 if rate.warmup == "none" else default_warmup(rate.epochs)
    warmup_epochs = rule.warmup(asked, **sizes)
    if rule.warmup_times_k:
        why = f"as asked; warmup of {asked:g} epochs at the base batch, {warmup_epochs:g} here"
        _check_warmup(rule, asked, warmup_epochs, epochs=rate.epochs, sizes=sizes)
    if rule.measured:
        _check_gain(name, **sizes)  # of a small training set
    sentence = rule.explain(base_lr, **sizes, exponent=rate.lr_exponent)
    return PeakRate(
        lr=rule.scaled(base_lr, **sizes, exponent=rate.lr_exponent),
        base_lr=base_lr,
        base_batch_size=sizes["base_batch_size"],
        rule=name,
        exponent=rate.lr_exponent,
        warmup_epochs=warmup_epochs,
        asked_warmup_epochs=asked,
        weight_decay=weight_decay,
        sentence=sentence if rule.measured else f"{sentence} ({why})",
    )


def freezes_norm_alone(settings: Settings) -> bool:
    """Whether BatchNorm keeps its statistics while all layers are trained."""
    return settings.batch.norm_batch_size == "frozen" and settings.model.train == "full"


def rate_of(settings: Settings, *, global_batch_size: int) -> PeakRate:
    """`peak_rate` of a recipe's settings."""
    return peak_rate(
        settings.rate,
        settings.optimizer,
        pretrained=settings.model.pretrained,
        frozen_norm=freezes_norm_alone(settings),
        global_batch_size=global_batch_size,
    )


def lines_of(rate: RateOptions, peak: PeakRate) -> list[str]:
    """The rate in words, and a line where a warmup was asked for and can't be seen."""
    flat = rate.warmup_start == "reference" and peak.lr == peak.base_lr
    warms = peak.warmup_epochs and rate.warmup != "none" and not rule_named(peak.rule).measured
    if not (flat and warms):
        return [peak.sentence]
    return [
        peak.sentence,
        f"warmup: none to see in its {peak.warmup_epochs:g} epochs, as --warmup-start "
        f"reference is the peak itself, {peak.lr:.6g}. --warmup-start zero starts from 0.",
    ]


def _check_warmup(
    rule: Rule, asked: float, warmup_epochs: float, *, epochs: float, sizes: Mapping[str, int]
) -> None:
    if warmup_epochs <= epochs:
        return
    most = asked * epochs / warmup_epochs
    raise InputError(
        f"--lr-scaling {rule.name}: --warmup-epochs {asked:g} at {sizes['base_batch_size']} "
        f"samples are {warmup_epochs:g} at {sizes['global_batch_size']}, longer than --epochs "
        f"{epochs:g}. Use --warmup-epochs {most:.4g} or less, --epochs {warmup_epochs:g}, or "
        f"--lr-scaling {rule.plain}."
    )
