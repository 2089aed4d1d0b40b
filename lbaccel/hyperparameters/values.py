"""The values that `transfer` moves, in three groups: rate, optimizer, run (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lbaccel.errors import InputError, check_choice, check_number, check_whole
from lbaccel.hyperparameters.optimizers import DECAYS, is_adam
from lbaccel.optim.scaling import find_rule, scale_lr


@dataclass(frozen=True, kw_only=True)
class OptimizerValues:
    """The moves of the optimizer, and of the average of its weights, at an update; see `transfer`.

    Raises:
        InputError: a value out of its range.
    """

    name: str
    momentum: float | None
    weight_decay: float
    decay: str
    ema_decay: float | None
    clip_grad_norm: float | None
    betas: tuple[float, float] | None
    eps: float | None

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, choices=DECAYS)
        beta1, beta2 = self.betas or (None, None)
        _check_above_zero({"eps": self.eps, "clip_grad_norm": self.clip_grad_norm})
        check_number("weight_decay", self.weight_decay, zero=True)
        below_one = {
            "momentum": self.momentum,
            "beta1": beta1,
            "beta2": beta2,
            "ema_decay": self.ema_decay,
        }
        for name, value in below_one.items():
            if value is not None:
                check_number(name, value, zero=True)
                if value >= 1:
                    raise InputError(f"{name}={value} must be in 0..1, below 1.")


@dataclass(frozen=True, kw_only=True)
class RateValues:
    """The learning rate of one batch, and how it is moved to another; see `transfer`.

    Raises:
        InputError: a value out of its range.
    """

    base_lr: float
    rule: str  # of `scale_lr`
    exponent: float | None
    warmup_epochs: float

    def __post_init__(self) -> None:
        check_number("base_lr", self.base_lr)
        check_number("warmup_epochs", self.warmup_epochs, zero=True)

    def stated_at(self, base_batch_size: int) -> RateValues:
        """The same rates with `base_lr` at that batch, where the rule states it at its own.

        >>> per_512 = RateValues(base_lr=0.4, rule="per-512", exponent=None, warmup_epochs=5)
        >>> at_256 = per_512.stated_at(256)
        >>> at_256.base_lr, at_256.rule
        (0.2, 'linear')
        """
        row = find_rule(self.rule)
        if row is None or row.samples is None:
            return self
        lr = self.lr_at(base_batch_size, base_batch_size=row.samples)
        return replace(self, base_lr=lr, rule=row.plain)

    def lr_at(self, global_batch_size: int, *, base_batch_size: int) -> float:
        """The rate at another batch.

        Raises:
            InputError: as `scale_lr`.
        """
        return scale_lr(
            self.base_lr,
            base_batch_size=base_batch_size,
            global_batch_size=global_batch_size,
            rule=self.rule,
            exponent=self.exponent,
        )


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """The length of the run, and what happens how often in it; see `transfer`.

    Raises:
        InputError: a value out of its range.
    """

    epochs: float | None
    num_samples: int | None
    eval_every: float | None
    log_every: int | None
    checkpoint_every: int | None

    def __post_init__(self) -> None:
        _check_above_zero({"epochs": self.epochs, "eval_every": self.eval_every})
        whole = {
            "num_samples": self.num_samples,
            "log_every": self.log_every,
            "checkpoint_every": self.checkpoint_every,
        }
        for name, value in whole.items():
            if value is not None:
                check_whole(name, value)

    def check(self, warmup_epochs: float, *, largest_batch: int) -> None:
        """Stop at a warmup that is longer than the run, and at a batch larger than an epoch.

        Raises:
            InputError: one of these.
        """
        if self.epochs is not None and warmup_epochs > self.epochs:
            raise InputError(
                f"warmup_epochs={warmup_epochs:g} is longer than the run of "
                f"epochs={self.epochs:g}. Use warmup_epochs <= {self.epochs:g}."
            )
        if self.num_samples is not None and largest_batch > self.num_samples:
            raise InputError(
                f"a batch of {largest_batch} is above num_samples={self.num_samples}: an update "
                f"can't hold more than an epoch. Use batches of at most {self.num_samples}."
            )


def betas_of(
    optimizer: str, beta1: float | None, beta2: float | None
) -> tuple[float, float] | None:
    """Both, by default Adam's for Adam and its kin; None where an optimizer is given none.

    Raises:
        InputError: one of the two, for another optimizer.
    """
    if is_adam(optimizer):
        return 0.9 if beta1 is None else beta1, 0.999 if beta2 is None else beta2
    if beta1 is None and beta2 is None:
        return None
    if beta1 is None or beta2 is None:
        raise InputError(f"beta1={beta1} and beta2={beta2}: {optimizer} needs both, or none.")
    return beta1, beta2


def _check_above_zero(values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            check_number(name, value)
