"""The recipe's learning rate, from its settings: rule, peak, warmup, weight decay (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbaccel.errors import InputError, check_number
from lbaccel.optim.scaling import choose_rule, explain_lr, legw, reference_batch, scale_lr


@dataclass(frozen=True)
class PeakRate:
    """What settings and a global batch make: the rate at the peak, and what goes with it."""

    lr: float
    base_lr: float
    base_batch_size: int
    rule: str
    exponent: float | None
    warmup_epochs: float  # after LEGW's factor
    asked_warmup_epochs: float
    weight_decay: float
    sentence: str


def check_scaling(s: Mapping[str, Any]) -> None:
    """Stop at a rule without what it needs, or with what it doesn't read.

    Raises:
        InputError: in the names of the flags.
    """
    rule, exponent = s["lr_scaling"], s["lr_exponent"]
    if rule == "power" and exponent is None:
        raise InputError(
            "--lr-scaling power needs its exponent. Use --lr-exponent 0.7 (1 is linear, 0.5 sqrt; "
            "a fit to ten tuned rates of a Wide-ResNet 16-4 on CIFAR-10 gives 0.69)."
        )
    if rule != "power" and exponent is not None:
        raise InputError(
            f"--lr-scaling {rule} does not read --lr-exponent {exponent:g}. Use --lr-scaling "
            "power, or leave it out."
        )
    if exponent is not None:
        check_number("--lr-exponent", exponent, zero=True)
    if rule == "adascale":
        _check_adascale(s)
        return
    reference = reference_batch(rule, s["base_batch_size"])
    if s["base_batch_size"] not in (256, reference):  # 256 is the default
        raise InputError(
            f"--lr-scaling {rule} states --base-lr per {reference} samples, and --base-batch-size "
            f"{s['base_batch_size']} says otherwise. Leave it out, or use --lr-scaling linear."
        )
    if rule != "legw":
        return
    if s["warmup"] == "none" or s["warmup_epochs"] is None:
        raise InputError(
            "--lr-scaling legw multiplies the warmup of the base batch by k, so it must be given: "
            "--warmup-epochs 0.5 (epochs at --base-batch-size), with --warmup gradual."
        )


def _check_adascale(s: Mapping[str, Any]) -> None:
    growing = s["batch_schedule"] or ("auto" if s["auto_batch"] else None)
    if growing is not None:
        raise InputError(
            f"--lr-scaling adascale with a batch that changes ({growing}): both say how the rate "
            "goes with the batch. Leave one out."
        )
    _check_gain(s["global_batch_size"], s["base_batch_size"])
    if s["noise_scale"] == "none":
        raise InputError(
            "--lr-scaling adascale with --noise-scale none: the gain is measured. Leave "
            "--noise-scale out."
        )


def _check_gain(global_batch_size: int, base_batch_size: int) -> None:
    if global_batch_size <= base_batch_size:
        raise InputError(
            f"--lr-scaling adascale with --global-batch-size {global_batch_size}: its gain is "
            f"over --base-batch-size {base_batch_size}, which must be smaller."
        )


def default_base_lr(optimizer: str, *, pretrained: bool) -> float:
    """0.1 for SGD (Goyal et al. 2017, at 256) and 0.001 for the others; a tenth for finetuning."""
    if choose_rule(optimizer)[0] == "linear":
        return 0.01 if pretrained else 0.1
    return 1e-4 if pretrained else 1e-3


def default_weight_decay(optimizer: str) -> float:
    """1e-4 for SGD, 0.05 for the others."""
    return 1e-4 if choose_rule(optimizer)[0] == "linear" else 0.05


def peak_rate(s: Mapping[str, Any], *, global_batch_size: int) -> PeakRate:
    """The learning rate of the recipe's settings `s` at a global batch, with its defaults.

    Raises:
        InputError: see `check_scaling` and `scale_lr`; under "legw" a warmup beyond the run.
    """
    check_scaling(s)
    rule, why = choose_rule(s["optimizer"].lower())
    if s["lr_scaling"] != "auto":
        rule, why = s["lr_scaling"], "as asked"
    base_lr, weight_decay = s["base_lr"], s["weight_decay"]
    if base_lr is None:
        base_lr = default_base_lr(s["optimizer"], pretrained=s["pretrained"])
    if weight_decay is None:
        weight_decay = default_weight_decay(s["optimizer"])
    batch = {
        "base_batch_size": reference_batch(rule, s["base_batch_size"]),
        "global_batch_size": global_batch_size,
    }
    asked = warmup_epochs = s["warmup_epochs"]
    if asked is None:
        asked = warmup_epochs = 0.0 if s["warmup"] == "none" else min(5.0, s["epochs"] / 4)
    if rule == "legw":
        _, warmup_epochs = legw(base_lr, **batch, warmup_epochs=asked)
        why = f"as asked; warmup of {asked:g} epochs at the base batch, {warmup_epochs:g} here"
        _check_legw(asked, warmup_epochs, epochs=s["epochs"], batch=batch)
    exponent = s["lr_exponent"]
    if rule == "adascale":
        _check_gain(global_batch_size, s["base_batch_size"])  # of a small training set
        k = global_batch_size / s["base_batch_size"]
        lr, sentence = (
            base_lr,
            (
                f"Learning rate ({base_lr:.6g} at {s['base_batch_size']}) times AdaScale's gain, "
                f"between 1 and {k:.6g}, measured at each update; the run takes up to {k:.6g} "
                "times as many updates as said above"
            ),
        )
    else:
        lr = scale_lr(base_lr, **batch, rule=rule, exponent=exponent)
        sentence = f"{explain_lr(base_lr, **batch, rule=rule, exponent=exponent)} ({why})"
    return PeakRate(
        lr=lr,
        base_lr=base_lr,
        base_batch_size=batch["base_batch_size"],
        rule=rule,
        exponent=exponent,
        warmup_epochs=warmup_epochs,
        asked_warmup_epochs=asked,
        weight_decay=weight_decay,
        sentence=sentence,
    )


def _check_legw(
    asked: float, warmup_epochs: float, *, epochs: float, batch: Mapping[str, int]
) -> None:
    if warmup_epochs <= epochs:
        return
    most = asked * epochs / warmup_epochs
    raise InputError(
        f"--lr-scaling legw: --warmup-epochs {asked:g} at {batch['base_batch_size']} samples are "
        f"{warmup_epochs:g} at {batch['global_batch_size']}, longer than --epochs {epochs:g}. "
        f"Use --warmup-epochs {most:.4g} or less, --epochs {warmup_epochs:g}, or --lr-scaling sqrt."
    )
