"""Learning-rate rules: the peak learning rate of a global batch size, one equation each (no torch).

With k = `global_batch_size` / `base_batch_size`, the pair (`base_lr`, `base_batch_size`) is the
recipe's reference, such as 0.1 at 256. `docs/methods.md` says where each rule fails.
"""

from __future__ import annotations

import math
import re

from lbaccel.errors import InputError, check_choice, check_number

RULES = ("linear", "sqrt", "power", "legw", "none")
_PER_SAMPLES = re.compile(r"per-([1-9]\d*)")
PER_SAMPLES = ("per-256", "per-512", "per-1024", "per-4096")  # what recipes are stated in

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
    return _usable(base_lr * _ratio(base_lr, base_batch_size, global_batch_size))


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
    return _usable(base_lr * math.sqrt(_ratio(base_lr, base_batch_size, global_batch_size)))


def no_scaling(base_lr: float, *, base_batch_size: int, global_batch_size: int) -> float:
    """Keep the learning rate whatever the batch: `lr = base_lr` (the batch sizes are checked only).

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: the control arm of every batch-size study, such as table I of "On the
    large-batch training of CIFAR-10" (EPFL report).

    >>> no_scaling(0.025, base_batch_size=32, global_batch_size=2048)
    0.025
    """
    _ratio(base_lr, base_batch_size, global_batch_size)
    return base_lr


def power_scaling(
    base_lr: float, *, base_batch_size: int, global_batch_size: int, exponent: float
) -> float:
    """Multiply by a power of k: `lr = base_lr * (global_batch_size / base_batch_size) ** exponent`.

    1 is the linear rule, 1/2 the square root, 0 none; fit it to rates that you have tuned. The
    ten tuned rates of a thesis on large and increasing batch sizes (Wide-ResNet 16-4, 128 to
    50,000 samples) give 0.69 by least squares in log-log, with a 95 % interval of 0.62 to 0.76
    (`docs/methods.md`).

    Raises:
        InputError: an argument that is not a positive finite number; of `exponent`, not a finite
            number from 0 on.

    >>> power_scaling(0.1, base_batch_size=256, global_batch_size=4096, exponent=0.75)
    0.8
    """
    ratio = _ratio(base_lr, base_batch_size, global_batch_size)
    check_number("exponent", exponent, zero=True)
    try:
        return _usable(base_lr * ratio**exponent)
    except OverflowError:
        return _usable(math.inf)


def legw(
    base_lr: float, *, base_batch_size: int, global_batch_size: int, warmup_epochs: float
) -> tuple[float, float]:
    """Linear-epoch gradual warmup: the root for the rate, k times the epochs for the warmup.

    `lr = base_lr * sqrt(k)` and `warmup_epochs * k`, with k = `global_batch_size` /
    `base_batch_size`: the warmup keeps its number of updates, not its samples.

    Args:
        base_lr: the rate at `base_batch_size`.
        base_batch_size: what the pair was tuned at.
        global_batch_size: samples of an update.
        warmup_epochs: of the warmup at `base_batch_size`.

    Returns:
        The peak learning rate and the epochs of warmup at `global_batch_size`.

    Raises:
        InputError: an argument that is not a positive finite number; 0 is allowed for the warmup.

    Source: You et al. 2019 (arXiv 1901.08256).

    >>> legw(0.1, base_batch_size=256, global_batch_size=1024, warmup_epochs=0.5)
    (0.2, 2.0)
    """
    sizes = {"base_batch_size": base_batch_size, "global_batch_size": global_batch_size}
    check_number("warmup_epochs", warmup_epochs, zero=True)
    lr = sqrt_scaling(base_lr, **sizes)
    return lr, warmup_epochs * (global_batch_size / base_batch_size)


def per_samples_scaling(base_lr: float, *, global_batch_size: int, samples: int = 1024) -> float:
    """A rate stated per so many samples: `lr = base_lr * global_batch_size / samples`.

    The linear rule in the words of transformer recipes, for any optimizer: DeiT and Swin state
    theirs per 512 samples, MAE per 256, ConvNeXt at 4096.

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: Touvron et al. 2021 (arXiv 2012.12877): `lr = 5e-4 * batch / 512` with AdamW.

    >>> per_samples_scaling(0.001, global_batch_size=4096)
    0.004
    """
    check_number("samples", samples)
    return linear_scaling(base_lr, base_batch_size=samples, global_batch_size=global_batch_size)


def reference_batch(rule: str, base_batch_size: int) -> int:
    """The batch that `base_lr` belongs to: N under a rule "per-N", else `base_batch_size`.

    >>> reference_batch("per-512", 256), reference_batch("linear", 256)
    (512, 256)
    """
    named = _PER_SAMPLES.fullmatch(rule)
    return int(named[1]) if named else base_batch_size


def scale_lr(
    base_lr: float,
    *,
    base_batch_size: int,
    global_batch_size: int,
    rule: str = "linear",
    exponent: float | None = None,
) -> float:
    """The peak learning rate of `global_batch_size` under a rule.

    With k = `global_batch_size` / `base_batch_size`: "linear" `base_lr * k`, "sqrt" and "legw"
    `base_lr * sqrt(k)`, "power" `base_lr * k ** exponent`, "none" `base_lr`; "per-N", such as
    "per-1024", is linear with `base_batch_size` N. Under "legw" the warmup is longer too: `legw`.

    Raises:
        InputError: an unknown rule, "power" without its `exponent` or another rule with one,
            "per-N" with another `base_batch_size`, or an argument that is not a positive finite
            number.

    Source: `linear_scaling`, `sqrt_scaling`, `power_scaling`, `legw`, `per_samples_scaling`,
    `no_scaling`.

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
    sizes = {"base_batch_size": base_batch_size, "global_batch_size": global_batch_size}
    per_samples = bool(_PER_SAMPLES.fullmatch(rule))
    reference = reference_batch(rule, base_batch_size)
    if per_samples and reference != base_batch_size:
        raise InputError(
            f"rule={rule!r} states base_lr per {reference} samples, and "
            f"base_batch_size={base_batch_size}. Use base_batch_size={reference}, or rule='linear'."
        )
    check_choice("rule", "linear" if per_samples else rule, choices=(*RULES, *PER_SAMPLES))
    if rule == "power":
        if exponent is None:
            raise InputError(
                "rule='power' needs its exponent. Use exponent=0.7 (a fit to ten tuned rates of a "
                "Wide-ResNet 16-4 on CIFAR-10 gives 0.69), or rule='linear' (1), rule='sqrt' (0.5)."
            )
        return power_scaling(base_lr, **sizes, exponent=exponent)
    if exponent is not None:
        raise InputError(
            f"rule={rule!r} does not read exponent={exponent!r}. Use rule='power', or leave it out."
        )
    if rule in ("sqrt", "legw"):
        return sqrt_scaling(base_lr, **sizes)
    return (no_scaling if rule == "none" else linear_scaling)(base_lr, **sizes)


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


def explain_lr(
    base_lr: float,
    *,
    base_batch_size: int,
    global_batch_size: int,
    rule: str,
    exponent: float | None = None,
) -> str:
    """The sentence that timm prints, with the reference batch size added.

    Raises:
        InputError: as `scale_lr`.

    >>> explain_lr(0.1, base_batch_size=256, global_batch_size=512, rule="linear")
    'Learning rate (0.2) calculated from base learning rate (0.1 at 256) and global batch size
    (512) with linear scaling.'
    """
    lr = scale_lr(
        base_lr,
        base_batch_size=base_batch_size,
        global_batch_size=global_batch_size,
        rule=rule,
        exponent=exponent,
    )
    named = "no" if rule == "none" else rule
    if exponent is not None:
        named += f" {exponent:g}"
    return (
        f"Learning rate ({lr:.6g}) calculated from base learning rate ({base_lr:.6g} at "
        f"{base_batch_size}) and global batch size ({global_batch_size}) with "
        f"{named} scaling."
    )


def _usable(lr: float) -> float:
    """The scaled rate, where it is one."""
    if not 0 < lr < math.inf:
        raise InputError(
            f"the scaled learning rate is {lr:g}. Use a rate, an exponent and batches that give a "
            "finite number above 0."
        )
    return lr


def _ratio(base_lr: float, base_batch_size: int, global_batch_size: int) -> float:
    """k, after checking all three; the ratio comes first, so that k = 1 gives `base_lr` exactly."""
    check_number("base_lr", base_lr)
    check_number("base_batch_size", base_batch_size)
    check_number("global_batch_size", global_batch_size)
    return global_batch_size / base_batch_size
