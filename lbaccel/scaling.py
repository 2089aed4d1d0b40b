"""Learning-rate rules: the peak learning rate of a global batch size, one equation each (no torch).

With k = `global_batch_size` / `base_batch_size`, the pair (`base_lr`, `base_batch_size`) is the
recipe's reference, such as 0.1 at 256. `docs/methods.md` says where each rule fails.
"""

from __future__ import annotations

import math
import re

from lbaccel.errors import InputError, check_choice, check_number

RULES = ("linear", "sqrt", "none")

# timm's and torch's names: nesterov, momentum, sgdw, sgdp, csgdw, fusedsgd, bnbsgd8bit, asgd, ...
_SGD_FAMILY = re.compile(r"(lookahead_)?(fused|bnb|c|a)?(sgd|nesterov|momentum)[wpc]*(8bit)?")


def linear_scaling(base_lr: float, *, base_batch_size: int, global_batch_size: int) -> float:
    """Multiply the learning rate by k: `lr = base_lr * global_batch_size / base_batch_size`.

    One update of k times the samples then moves the weights as far as k updates did, as long as
    the gradient changes little over them.

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 2.1, equations 3 and 4.

    >>> linear_scaling(0.1, base_batch_size=256, global_batch_size=8192)
    3.2
    """
    return base_lr * _ratio(base_lr, base_batch_size, global_batch_size)


def sqrt_scaling(base_lr: float, *, base_batch_size: int, global_batch_size: int) -> float:
    """Multiply by the root of k: `lr = base_lr * sqrt(global_batch_size / base_batch_size)`.

    Keeps the covariance of an SGD update (Krizhevsky 2014, arXiv 1404.5997, page 5; Hoffer et al.
    2017, arXiv 1705.08741) and is the rule of RMSProp and Adam where gradient noise dominates.

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: Malladi et al. 2022 (arXiv 2205.10287), section 5; that rule also changes the betas and
    epsilon, which stay as they are here.

    >>> sqrt_scaling(0.001, base_batch_size=256, global_batch_size=1024)
    0.002
    """
    return base_lr * math.sqrt(_ratio(base_lr, base_batch_size, global_batch_size))


def no_scaling(base_lr: float, *, base_batch_size: int, global_batch_size: int) -> float:
    """Keep the learning rate whatever the batch: `lr = base_lr` (the batch sizes are checked only).

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: the control arm of every batch-size study, such as table I of study D.

    >>> no_scaling(0.025, base_batch_size=32, global_batch_size=2048)
    0.025
    """
    _ratio(base_lr, base_batch_size, global_batch_size)
    return base_lr


def scale_lr(
    base_lr: float, *, base_batch_size: int, global_batch_size: int, rule: str = "linear"
) -> float:
    """The peak learning rate of `global_batch_size` under a rule: "linear", "sqrt" or "none".

    With k = `global_batch_size` / `base_batch_size`: `base_lr * k`, `base_lr * sqrt(k)`, `base_lr`.

    Raises:
        InputError: an unknown rule, or an argument that is not a positive finite number.

    Source: `linear_scaling`, `sqrt_scaling`, `no_scaling`.

    >>> scale_lr(0.1, base_batch_size=256, global_batch_size=512)
    0.2
    >>> scale_lr(0.1, base_batch_size=256, global_batch_size=1024, rule="sqrt")
    0.2
    """
    if rule == "auto":
        raise InputError(
            "rule='auto' depends on the optimizer, which scale_lr does not see. "
            "Use rule=choose_rule(optimizer)[0]."
        )
    check_choice("rule", rule, choices=RULES)
    scaling = {"linear": linear_scaling, "sqrt": sqrt_scaling, "none": no_scaling}[rule]
    return scaling(base_lr, base_batch_size=base_batch_size, global_batch_size=global_batch_size)


def choose_rule(optimizer: str) -> tuple[str, str]:
    """Rule "auto": the learning-rate rule for an optimizer's name, and the reason in words.

    Linear for the SGD family, sqrt for all else. timm's `train.py` takes sqrt only for names with
    "ada" or "lamb", so LARS, Lion and RMSProp are linear there and sqrt here.

    Args:
        optimizer: a name of timm's (`sgd`, `adamw`, `lamb`) or of a torch class (`SGD`).

    Raises:
        InputError: an empty name.

    Source: Goyal et al. 2017, section 2.1 (linear); Malladi et al. 2022, section 5 (sqrt).

    >>> choose_rule("sgd")[0], choose_rule("AdamW")[0]
    ('linear', 'sqrt')
    """
    name = optimizer.strip().lower()
    if not name:
        raise InputError("optimizer='' names no optimizer. Use a name such as 'sgd' or 'adamw'.")
    if _SGD_FAMILY.fullmatch(name):
        return "linear", (
            f"{optimizer} is of the SGD family: its update is proportional to the gradient, so one "
            "update over k times the samples replaces k updates (Goyal et al. 2017, section 2.1)"
        )
    return "sqrt", (
        f"{optimizer} normalises its update, so the update's size doesn't shrink with the gradient "
        "noise as SGD's does: the square root keeps the noise of the trajectory "
        "(Malladi et al. 2022, section 5)"
    )


def explain_lr(base_lr: float, *, base_batch_size: int, global_batch_size: int, rule: str) -> str:
    """The sentence that timm prints, with the reference batch size added.

    Raises:
        InputError: as `scale_lr`.

    >>> explain_lr(0.1, base_batch_size=256, global_batch_size=512, rule="linear")
    'Learning rate (0.2) calculated from base learning rate (0.1 at 256) and global batch size
    (512) with linear scaling.'
    """
    lr = scale_lr(
        base_lr, base_batch_size=base_batch_size, global_batch_size=global_batch_size, rule=rule
    )
    return (
        f"Learning rate ({lr:.6g}) calculated from base learning rate ({base_lr:.6g} at "
        f"{base_batch_size}) and global batch size ({global_batch_size}) with "
        f"{'no' if rule == 'none' else rule} scaling."
    )


def _ratio(base_lr: float, base_batch_size: int, global_batch_size: int) -> float:
    """k, after checking all three; the ratio comes first, so that k = 1 gives `base_lr` exactly."""
    check_number("base_lr", base_lr)
    check_number("base_batch_size", base_batch_size)
    check_number("global_batch_size", global_batch_size)
    return global_batch_size / base_batch_size
