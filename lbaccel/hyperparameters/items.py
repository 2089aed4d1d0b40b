"""One row an item of the sheet: its rule, and where that can't be followed (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError
from lbaccel.hyperparameters.optimizers import decay_of, is_adam, is_rmsprop
from lbaccel.hyperparameters.rows import Row
from lbaccel.hyperparameters.values import OptimizerValues, RateValues, RunValues
from lbaccel.optim.scaling import (
    CHOSEN,
    EPFL,
    GOYAL,
    MALLADI,
    THESIS,
    Rule,
    choose_rule,
    is_sgd,
    rule_named,
)


@dataclass(frozen=True, kw_only=True)
class Move:
    """Two batches, and all values at the first; see `transfer`."""

    base_batch_size: int
    global_batch_size: int
    rate: RateValues
    lr: float  # at `global_batch_size`
    optimizer: OptimizerValues
    run: RunValues

    @property
    def k(self) -> float:
        """`global_batch_size / base_batch_size`."""
        return self.global_batch_size / self.base_batch_size

    @property
    def row(self) -> Rule:
        """All that is known of the rate's rule."""
        return rule_named(self.rate.rule)

    @property
    def by_root(self) -> bool:
        """Whether the rate goes by the square root, whatever the rule is called."""
        return 0.5 in (self.row.power, self.rate.exponent)


def all_rows(m: Move, warnings: list[str]) -> list[Row]:
    """The rows, in order; `warnings` are added to."""
    rows = [_learning_rate(m), _warmup(m)]
    for part in (_momentum, _weight_decay, _moments, _clip, _ema, _noise, _cadence, _updates):
        rows += part(m, warnings)
    return rows


def _learning_rate(m: Move) -> Row:
    source, sure, name = m.row.source, m.row.sure, m.optimizer.name
    if m.rate.rule in CHOSEN and choose_rule(name)[0] != m.rate.rule:
        source, sure = "as asked", f"not the usual rule for {name}"
    elif m.rate.rule in CHOSEN and not any(known(name) for known in (is_sgd, is_adam, is_rmsprop)):
        sure = f"cautious: no derivation for {name}"
    p = "" if m.rate.exponent is None else f", p = {m.rate.exponent:g}"
    rule = f"{m.rate.rule}: {m.row.equation}, k = {m.k:.6g}{p}"
    return Row("learning rate", m.rate.base_lr, m.lr, rule, source, sure)


def _warmup(m: Move) -> Row:
    old = new = m.rate.warmup_epochs
    rule, source = "the same epochs", f"{GOYAL}, section 2.2"
    sure = "usual; few updates at large k may want more epochs"
    if m.row.warmup_times_k:
        new = m.row.warmup(
            old, base_batch_size=m.base_batch_size, global_batch_size=m.global_batch_size
        )
        rule, source, sure = "the same updates: epochs x k", m.row.source, m.row.sure
        if m.run.epochs is not None and new > m.run.epochs:
            raise InputError(
                f"lr_scaling={m.rate.rule!r}: warmup_epochs={old:g} become {new:g} at "
                f"{m.global_batch_size} samples, longer than epochs={m.run.epochs:g}. Use "
                f"warmup_epochs <= {m.run.epochs / m.k:.4g}, epochs >= {new:g}, or "
                f"lr_scaling={m.row.plain!r}."
            )
    if m.run.num_samples is not None:
        before = math.ceil(old * m.run.num_samples / m.base_batch_size)
        after = math.ceil(new * m.run.num_samples / m.global_batch_size)
        rule += f" ({before} -> {after} updates)"
    return Row("warmup, epochs", old, new, rule, source, sure)


def _momentum(m: Move, warnings: list[str]) -> list[Row]:
    kept = m.optimizer.momentum
    if kept is None:
        return []
    sure = "usual, not derived: its horizon, B / (1 - m) samples, grows k-fold"
    return [Row("momentum", kept, kept, "kept", f"{GOYAL}, section 5.1", sure)]


def _weight_decay(m: Move, warnings: list[str]) -> list[Row]:
    old = m.optimizer.weight_decay
    kind = decay_of(m.optimizer.name, m.optimizer.decay)
    new = old * m.k * m.rate.base_lr / m.lr if kind == "decoupled" else old
    rule, source, sure = {
        "decoupled": (
            "decoupled: x k lr_old / lr_new, so that lr x decay a sample stays",
            "Wang and Aitchison 2024, arXiv 2405.13698",
            "derived, and tested with AdamW",
        ),
        "coupled": (
            "coupled L2: kept, a part of the loss",
            f"{GOYAL}, remark 1",
            "usual; lr x decay a sample stays under linear only",
        ),
        "trust ratio": (
            "kept: its share of the direction that the trust ratio scales",
            "You et al. 2017, arXiv 1708.03888; 2020, arXiv 1904.00962",
            "as published; no derivation",
        ),
    }[kind]
    return [Row("weight decay", old, new, rule, source, sure)]


def _moments(m: Move, warnings: list[str]) -> list[Row]:
    """Malladi's square-root rule as a whole: it belongs to a rate that goes by the root."""
    if is_rmsprop(m.optimizer.name) and m.by_root:
        warnings.append(
            f"Malladi's rule also takes 1 - alpha x {m.k:.6g} and eps / {math.sqrt(m.k):.6g} for "
            "RMSProp; alpha has no setting here."
        )
    whole_rule = is_adam(m.optimizer.name) and m.by_root
    rows: list[Row] = []
    kept = "kept: its rule belongs to sqrt" if is_adam(m.optimizer.name) else "kept"
    open_for = "open" if is_adam(m.optimizer.name) else f"no derivation for {m.optimizer.name}"
    betas = list(m.optimizer.betas or ())
    for i, old in enumerate(betas):
        name = f"beta{i + 1}"
        # exact in the decimals that were typed: 0.9 at k = 10 is 0, and not 2e-16
        k = Fraction(m.global_batch_size, m.base_batch_size)
        new = float(1 - k * (1 - Fraction(repr(float(old)))))
        if not whole_rule:
            row = Row(name, old, old, kept, "none", open_for)
        elif 0 < new < 1:
            sure = "derived; many recipes leave it out"
            row = Row(name, old, new, "1 - k (1 - beta)", f"{MALLADI}, section 5", sure)
        else:
            limit = m.base_batch_size / (1 - old)
            warnings.append(
                f"{name}: 1 - {m.k:.6g} x (1 - {old:g}) = {new:.6g} is not in (0, 1), so it is "
                f"kept at {old:g}. The square-root rule can be followed below a batch of "
                f"{limit:.6g}; past it the learning rate is a guess too."
            )
            sure = "open: past the rule's range"
            row = Row(name, old, old, "kept: 1 - k (1 - beta) leaves (0, 1)", MALLADI, sure)
        rows.append(row)
        betas[i] = float(row.new)  # type: ignore[arg-type]
    if betas and betas[0] ** 2 >= math.sqrt(betas[1]):
        warnings.append(
            f"beta1^2 = {betas[0] ** 2:.4g} is not below sqrt(beta2) = {math.sqrt(betas[1]):.4g}, "
            "the condition of Adam's convergence proof (Kingma and Ba 2015, theorem 4.1)."
        )
    old = m.optimizer.eps
    if old is None:
        return rows
    if not whole_rule:
        return [*rows, Row("eps", old, old, kept, "none", open_for)]
    new = old / math.sqrt(m.k)
    return [*rows, Row("eps", old, new, "eps / sqrt(k)", f"{MALLADI}, section 5", "derived")]


def _clip(m: Move, warnings: list[str]) -> list[Row]:
    old = m.optimizer.clip_grad_norm
    if old is None:
        return []
    sure = "open: the noise's share of the norm falls with sqrt(k), so it clips less often"
    return [Row("clip norm", old, old, "kept: of the mean gradient", THESIS, sure)]


def _ema(m: Move, warnings: list[str]) -> list[Row]:
    old = m.optimizer.ema_decay
    if old is None:
        return []
    half = m.base_batch_size * half_life(old)
    if m.run.epochs is not None and m.run.num_samples is not None and half:
        run = m.run.epochs * m.run.num_samples
        if run < 3 * half:
            fits = 0.5 ** (3 * m.base_batch_size / run)
            warnings.append(
                f"EMA: {run / half:.3g} half-lives of {half:,.0f} samples fit in the run. Below 3, "
                "more than 1 / 8 of the average is the weights it began with. Use a shorter one, "
                f"of at most {fits:.6g} at a batch of {m.base_batch_size}."
            )
    rule = f"decay^k: a half-life of {half:,.0f} samples"
    source = "Busbridge et al. 2023, arXiv 2307.13813"
    return [Row("EMA decay", old, old**m.k, rule, source, "derived and tested")]


def half_life(decay: float) -> float:
    """Updates after which an average has forgotten half: `ln 2 / -ln decay`; 0 for a decay of 0.

    >>> half_life(0.5), half_life(0.0)
    (1.0, 0.0)
    """
    return math.log(2) / -math.log(decay) if decay else 0.0


def _noise(m: Move, warnings: list[str]) -> list[Row]:
    n = m.run.num_samples
    if n is None or m.optimizer.momentum is None or not is_sgd(m.optimizer.name):
        return []
    old = m.rate.base_lr * (n / m.base_batch_size - 1)
    new = m.lr * (n / m.global_batch_size - 1)
    left = 1 - m.optimizer.momentum
    rule = f"g = eta (N / B - 1); over 1 - m: {old / left:.6g} -> {new / left:.6g}"
    source = f"Smith and Le 2018, arXiv 1710.06451; {EPFL}, equation 4"
    return [Row("SGD noise scale", old, new, rule, source, "a figure, no setting; for B << N")]


def _cadence(m: Move, warnings: list[str]) -> list[Row]:
    rows: list[Row] = []
    if m.run.eval_every is not None:
        every = m.run.eval_every
        rows.append(Row("evaluation, epochs", every, every, "the same epochs", "none", "certain"))
    for item, old in (
        ("log, updates", m.run.log_every),
        ("checkpoint, updates", m.run.checkpoint_every),
    ):
        if old is not None:
            rule = "the same samples: updates / k, at least 1"
            rows.append(Row(item, old, max(1, round(old / m.k)), rule, "none", "certain"))
    return rows


def _updates(m: Move, warnings: list[str]) -> list[Row]:
    if m.run.epochs is None or m.run.num_samples is None:
        return []
    old, new = (
        UpdateStream(batch, m.run.num_samples).num_updates(m.run.epochs)
        for batch in (m.base_batch_size, m.global_batch_size)
    )
    source = "Shallue et al. 2019, arXiv 1811.03600"
    sure = "exact; whether they are enough is the open question"
    return [Row("updates of the run", old, new, "epochs x N / B", source, sure)]
