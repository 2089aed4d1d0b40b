"""A learning-rate rule as one row of a table; `optim/scaling.py` holds the table (no torch)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from lbaccel.errors import InputError, check_number


def sentence(scaling: str) -> str:
    """timm's, with the reference batch size added."""
    return (
        "Learning rate ({lr:.6g}) calculated from base learning rate ({base_lr:.6g} at "
        f"{{base_batch_size}}) and global batch size ({{global_batch_size}}) with {scaling} "
        "scaling."
    )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A learning-rate rule: `lr = base_lr * factor(k, exponent)`, and what goes with it.

    Args:
        name: as `--lr-scaling` takes it.
        factor: of the learning rate, a function of k and the exponent; 1 where it is `measured`.
        formula: the factor as text, in k and the exponent p.
        power: of k, where the factor is a fixed power of it.
        source: who published it.
        sure: how well it is tested, for the sheet of `lbaccel transfer`.
        help: what `--help` says of it, where its name does not say it.
        explanation: the line that a run prints, with the fields of `explain`.
        reads: the settings beside `base_lr` that it reads.
        warmup_times_k: whether the epochs of the warmup are multiplied by k.
        same_factor_as: the rule that has its factor and nothing else, where that is another one.
        samples: N, where `base_lr` is a rate per N samples.
        measured: whether the run measures a gain that multiplies the rate at each update.
    """

    name: str
    factor: Callable[[float, float], float]
    formula: str
    source: str
    power: Fraction | None = None
    sure: str = ""
    help: str = ""
    explanation: str = sentence("{name}")
    reads: tuple[str, ...] = ("base_batch_size",)
    warmup_times_k: bool = False
    same_factor_as: str | None = None
    samples: int | None = None
    measured: bool = False

    @property
    def plain(self) -> str:
        """The name of the rule that has this factor and does nothing else."""
        return self.same_factor_as or self.name

    @property
    def equation(self) -> str:
        """The rate of the new batch, eta, from that of the old one, eta0."""
        return "eta = eta0" if self.formula == "1" else f"eta = {self.formula} eta0"

    def formula_at(self, k: str, exponent: float | None = None) -> str:
        """The formula with k and p written out: "sqrt(512 / 256)" for k "512 / 256"."""
        text = re.sub(r"\bp\b", f"{exponent}", self.formula)
        stands_alone = self.formula == "k" or "(k)" in self.formula
        return re.sub(r"\bk\b", k if stands_alone else f"({k})", text)

    def scaled(
        self,
        base_lr: float,
        *,
        base_batch_size: int,
        global_batch_size: int,
        exponent: float | None = None,
    ) -> float:
        """The rate of `global_batch_size` from that of any `base_batch_size`.

        Raises:
            InputError: an argument, or the rate that comes out, that is not a positive finite
                number.
        """
        ratio = _ratio(base_lr, base_batch_size, global_batch_size)
        if "lr_exponent" in self.reads:
            check_number("exponent", exponent, zero=True)  # type: ignore[arg-type]  # None: refused
        try:
            lr = base_lr * self.factor(ratio, 1.0 if exponent is None else exponent)
        except OverflowError:
            lr = math.inf
        if not 0 < lr < math.inf:
            raise InputError(
                f"the scaled learning rate is {lr:g}. Use a rate, an exponent and batches that "
                "give a finite number above 0."
            )
        return lr

    def warmup(self, epochs: float, *, base_batch_size: int, global_batch_size: int) -> float:
        """The epochs of warmup at `global_batch_size`, from those at `base_batch_size`."""
        if not self.warmup_times_k:
            return epochs
        check_number("warmup_epochs", epochs, zero=True)
        return epochs * (global_batch_size / base_batch_size)

    def explain(
        self,
        base_lr: float,
        *,
        base_batch_size: int,
        global_batch_size: int,
        exponent: float | None = None,
    ) -> str:
        """The line that a run prints; raises as `scaled`."""
        sizes = {"base_batch_size": base_batch_size, "global_batch_size": global_batch_size}
        lr = self.scaled(base_lr, **sizes, exponent=exponent)
        k = global_batch_size / base_batch_size
        found = {"name": self.name, "exponent": exponent, "lr": lr, "base_lr": base_lr, "k": k}
        return self.explanation.format(**found, **sizes)


def _ratio(base_lr: float, base_batch_size: int, global_batch_size: int) -> float:
    """k, after checking all three; the ratio comes first, so that k = 1 gives `base_lr` exactly."""
    check_number("base_lr", base_lr)
    check_number("base_batch_size", base_batch_size)
    check_number("global_batch_size", global_batch_size)
    return global_batch_size / base_batch_size
