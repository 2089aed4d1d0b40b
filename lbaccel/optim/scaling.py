"""Learning-rate rules: the peak learning rate of a global batch size, one equation each (no torch).

With k = `global_batch_size` / `base_batch_size`, the pair (`base_lr`, `base_batch_size`) is the
recipe's reference, such as 0.1 at 256. `docs/methods.md` says where each rule fails.

`TABLE` holds the rules: a new rule is a new row, and no other file names it.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

from lbaccel.errors import InputError, check_choice, check_number
from lbaccel.optim.rule import Rule, sentence

GOYAL = "Goyal et al. 2017, arXiv 1706.02677"
MALLADI = "Malladi et al. 2022, arXiv 2205.10287"
EPFL = '"On the large-batch training of CIFAR-10" (EPFL report)'
THESIS = "a thesis on large and increasing batch sizes"

_LINEAR = Rule(
    name="linear",
    factor=lambda k, _: k,
    formula="k",
    power=Fraction(1),
    source=f"{GOYAL}, section 2.1",
    sure="well tested for SGD, up to 8k on ImageNet",
)
_SQRT = Rule(
    name="sqrt",
    factor=lambda k, _: math.sqrt(k),
    formula="sqrt(k)",
    power=Fraction(1, 2),
    source=f"{MALLADI}, section 5",
    sure="derived for noisy gradients; tested",
)
_POWER = Rule(
    name="power",
    factor=lambda k, exponent: k**exponent,
    formula="k^p",
    source=f"a fit to tuned rates, as in {THESIS}",
    sure="as good as the fit",
    explanation=sentence("{name} {exponent:g}"),
    reads=("base_batch_size", "lr_exponent"),
)
_LEGW = replace(
    _SQRT,
    name="legw",
    source="You et al. 2019, arXiv 1901.08256",
    sure="its authors' tests only",
    help="sqrt, and --warmup-epochs x k",
    warmup_times_k=True,
    same_factor_as="sqrt",
)
_NONE = Rule(
    name="none",
    factor=lambda *_: 1,
    formula="1",
    power=Fraction(0),
    source=f"the control arm of {EPFL}",
    sure="certain to lose at large k",
    explanation=sentence("no"),
    reads=(),
)
_PER_N = replace(
    _LINEAR,
    name="per-N",
    source="Touvron et al. 2021, arXiv 2012.12877",
    help="linear, --base-lr is per N samples",
    reads=(),
    same_factor_as="linear",
)
_ADASCALE = Rule(
    name="adascale",
    factor=lambda *_: 1,
    formula="gain",
    source="Johnson et al. 2020, arXiv 2007.05105",
    help="the measured gain of each update",
    explanation=(
        "Learning rate ({base_lr:.6g} at {base_batch_size}) times AdaScale's gain, between 1 and "
        "{k:.6g}, measured at each update; the run takes up to {k:.6g} times as many updates as "
        "said above"
    ),
    reads=("base_batch_size", "noise_scale"),
    measured=True,
)
TABLE = (_LINEAR, _SQRT, _POWER, _LEGW, _NONE, _ADASCALE)
RULES = tuple(rule.name for rule in TABLE if not rule.measured)
PER_SAMPLES = ("per-256", "per-512", "per-1024", "per-4096")  # what recipes are stated in
CHOICES = ("auto", *RULES, *PER_SAMPLES, *(rule.name for rule in TABLE if rule.measured))
HELP = "; ".join(
    f"{rule.name}: {rule.help}"
    for rule in sorted((*TABLE, _PER_N), key=lambda rule: rule.measured)
    if rule.help
)
_PER_SAMPLES = re.compile(r"per-([1-9]\d*)")
CHOSEN = (_LINEAR.name, _SQRT.name)  # by `choose_rule`
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
    return _LINEAR.scaled(
        base_lr, base_batch_size=base_batch_size, global_batch_size=global_batch_size
    )


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
    return _SQRT.scaled(
        base_lr, base_batch_size=base_batch_size, global_batch_size=global_batch_size
    )


def no_scaling(base_lr: float, *, base_batch_size: int, global_batch_size: int) -> float:
    """Keep the learning rate whatever the batch: `lr = base_lr` (the batch sizes are checked only).

    Raises:
        InputError: an argument that is not a positive finite number.

    Source: the control arm of every batch-size study, such as table I of "On the
    large-batch training of CIFAR-10" (EPFL report).

    >>> no_scaling(0.025, base_batch_size=32, global_batch_size=2048)
    0.025
    """
    return _NONE.scaled(
        base_lr, base_batch_size=base_batch_size, global_batch_size=global_batch_size
    )


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
    sizes = {"base_batch_size": base_batch_size, "global_batch_size": global_batch_size}
    return _POWER.scaled(base_lr, **sizes, exponent=exponent)


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
    return _LEGW.scaled(base_lr, **sizes), _LEGW.warmup(warmup_epochs, **sizes)


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


def find_rule(name: str) -> Rule | None:
    """The row of a rule's name; None for other names, such as "auto", which is a choice of rules.

    >>> find_rule("sqrt").formula, find_rule("per-640").samples, find_rule("auto")
    ('sqrt(k)', 640, None)
    """
    per_samples = _PER_SAMPLES.fullmatch(name)
    if per_samples:
        return replace(_PER_N, name=name, samples=int(per_samples[1]))
    return next((rule for rule in TABLE if rule.name == name), None)


def rule_named(name: str) -> Rule:
    """The row of a rule's name.

    Raises:
        InputError: there is no rule of that name.
    """
    found = find_rule(name)
    if found is None:
        check_choice("rule", name, choices=(*RULES, *PER_SAMPLES))
        raise AssertionError(name)  # each of the choices has a row
    return found


def is_measured(name: str) -> bool:
    """Whether the rate under a choice of `--lr-scaling` follows what the run measures.

    >>> is_measured("adascale"), is_measured("auto")
    (True, False)
    """
    rule = find_rule(name)
    return rule is not None and rule.measured


def reference_batch(rule: str, base_batch_size: int) -> int:
    """The batch that `base_lr` belongs to: N under a rule "per-N", else `base_batch_size`.

    >>> reference_batch("per-512", 256), reference_batch("linear", 256)
    (512, 256)
    """
    found = find_rule(rule)
    return base_batch_size if found is None or found.samples is None else found.samples


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
    if is_measured(rule):
        check_choice("rule", rule, choices=(*RULES, *PER_SAMPLES))  # no size alone gives the rate
    row = rule_named(rule)
    if row.samples not in (None, base_batch_size):
        raise InputError(
            f"rule={rule!r} states base_lr per {row.samples} samples, and base_batch_size="
            f"{base_batch_size}. Use base_batch_size={row.samples}, or rule='linear'."
        )
    if "lr_exponent" in row.reads and exponent is None:
        raise InputError(
            f"rule={rule!r} needs its exponent. Use exponent=0.7 (a fit to ten tuned rates of a "
            "Wide-ResNet 16-4 on CIFAR-10 gives 0.69), or rule='linear' (1), rule='sqrt' (0.5)."
        )
    if "lr_exponent" not in row.reads and exponent is not None:
        raise InputError(
            f"rule={rule!r} does not read exponent={exponent!r}. Use rule='power', or leave it out."
        )
    return row.scaled(base_lr, **sizes, exponent=exponent)


def is_sgd(optimizer: str) -> bool:
    """Whether an optimizer's name is of the SGD family.

    Raises:
        InputError: an empty name.
    """
    name = optimizer.strip().lower()
    if not name:
        raise InputError("optimizer='' names no optimizer. Use a name such as 'sgd' or 'adamw'.")
    return _SGD_FAMILY.fullmatch(name) is not None


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
    if is_sgd(optimizer):
        return _LINEAR.name, (
            f"{optimizer} is of the SGD family: its update is proportional to the gradient, so one "
            "update over k times the samples replaces k updates (Goyal et al. 2017, section 2.1)"
        )
    return _SQRT.name, (
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
    sizes = {"base_batch_size": base_batch_size, "global_batch_size": global_batch_size}
    scale_lr(base_lr, **sizes, rule=rule, exponent=exponent)  # refuses what the rule does not take
    return rule_named(rule).explain(base_lr, **sizes, exponent=exponent)
