"""Every hyper-parameter that a batch size reaches, moved to another one (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbaccel.errors import InputError, check_whole
from lbaccel.hyperparameters.items import Move, all_rows
from lbaccel.hyperparameters.optimizers import is_adam
from lbaccel.hyperparameters.rows import Sheet
from lbaccel.hyperparameters.values import (
    OptimizerValues,
    RateValues,
    RunValues,
    betas_of,
)
from lbaccel.optim.defaults import default_base_lr, default_warmup, default_weight_decay
from lbaccel.optim.scaling import choose_rule, is_sgd


def transfer(
    *,
    base_batch_size: int,
    global_batch_size: int,
    optimizer: str = "sgd",
    base_lr: float | None = None,
    lr_scaling: str = "auto",
    lr_exponent: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    decay: str = "auto",
    ema_decay: float | None = None,
    clip_grad_norm: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    warmup_epochs: float | None = None,
    epochs: float | None = None,
    num_samples: int | None = None,
    eval_every: float | None = None,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
) -> Sheet:
    """The hyper-parameters of `base_batch_size`, moved to `global_batch_size`.

    With k = `global_batch_size` / `base_batch_size`: the learning rate by its rule; warmup in
    epochs, k times as many under LEGW; coupled weight decay kept, decoupled times
    k lr_old / lr_new; EMA decay to the power k; Adam's 1 - beta times k and eps / sqrt(k) where
    the rate goes by the root; cadences in samples. What is not given, and has no default here, is
    not on the sheet. `docs/methods.md` derives each.

    Args:
        base_batch_size: the batch at which all the values given are in use.
        global_batch_size: the batch to move to.
        optimizer: a name of timm's.
        base_lr: the rate at `base_batch_size`, under "per-N" per N samples; by default the
            recipe's, 0.1 (SGD) or 0.001.
        lr_scaling: a rule of `scale_lr`, or "auto" (`choose_rule`).
        lr_exponent: of the rule "power".
        momentum: of SGD and its kin; for SGD 0.9 by default.
        weight_decay: by default the recipe's, 1e-4 (SGD) or 0.05.
        decay: "coupled" (L2 in the gradient), "decoupled" (AdamW's), or "auto" by the name.
        ema_decay: of an average of the weights, an update.
        clip_grad_norm: largest norm of the gradient.
        beta1: of the mean; for Adam 0.9 by default.
        beta2: of the square; for Adam 0.999 by default.
        eps: for Adam 1e-8 by default.
        warmup_epochs: at `base_batch_size`; by default the recipe's, 5 or a quarter of `epochs`.
        epochs: of the run; with `num_samples` it gives the number of updates.
        num_samples: samples of one epoch.
        eval_every: epochs between evaluations.
        log_every: updates between log lines.
        checkpoint_every: updates between checkpoints.

    Raises:
        InputError: a value out of its range, or a rule without what it needs.

    Source: each row of the sheet names its own.

    >>> sheet = transfer(base_batch_size=256, global_batch_size=8192, ema_decay=0.9999)
    >>> sheet.lr, round(sheet.row("EMA decay").new, 6)
    (3.2, 0.996805)
    """
    check_whole("base_batch_size", base_batch_size)
    check_whole("global_batch_size", global_batch_size)
    steps = OptimizerValues(
        name=optimizer,
        momentum=0.9 if momentum is None and is_sgd(optimizer) else momentum,
        weight_decay=default_weight_decay(optimizer) if weight_decay is None else weight_decay,
        decay=decay,
        ema_decay=ema_decay,
        clip_grad_norm=clip_grad_norm,
        betas=betas_of(optimizer, beta1, beta2),
        eps=1e-8 if eps is None and is_adam(optimizer) else eps,
    )
    rate = RateValues(
        base_lr=default_base_lr(optimizer, pretrained=False) if base_lr is None else base_lr,
        rule=choose_rule(optimizer)[0] if lr_scaling == "auto" else lr_scaling,
        exponent=lr_exponent,
        warmup_epochs=default_warmup(epochs) if warmup_epochs is None else warmup_epochs,
    )
    run = RunValues(
        epochs=epochs,
        num_samples=num_samples,
        eval_every=eval_every,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
    )
    run.check(rate.warmup_epochs, largest_batch=max(base_batch_size, global_batch_size))
    rate = rate.stated_at(base_batch_size)
    move = Move(
        base_batch_size=base_batch_size,
        global_batch_size=global_batch_size,
        rate=rate,
        lr=rate.lr_at(global_batch_size, base_batch_size=base_batch_size),
        optimizer=steps,
        run=run,
    )
    return _sheet(move)


def _sheet(move: Move) -> Sheet:
    warnings: list[str] = []
    rows = all_rows(move, warnings)
    for row in rows:
        if isinstance(row.new, float) and not math.isfinite(row.new):
            raise InputError(
                f"{row.item}: {row.old} at {move.base_batch_size} samples would be {row.new} at "
                f"{move.global_batch_size}. Use a smaller value."
            )
    return Sheet(
        base_batch_size=move.base_batch_size,
        global_batch_size=move.global_batch_size,
        lr=move.lr,
        rows=tuple(rows),
        warnings=tuple(warnings),
        settings=_settings(move, {row.item: row.new for row in rows}),
    )


def _settings(move: Move, new: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the recipe; LEGW as what it makes, so that nothing multiplies its warmup again."""
    found = {
        "optimizer": move.optimizer.name,
        "global_batch_size": move.global_batch_size,
        "base_lr": move.rate.base_lr,
        "base_batch_size": move.base_batch_size,
        "lr_scaling": move.row.plain,
        "lr_exponent": move.rate.exponent,
        "warmup_epochs": new["warmup, epochs"],
        "epochs": move.run.epochs,
        "momentum": move.optimizer.momentum,
        "weight_decay": new["weight decay"],
        "clip_grad_norm": move.optimizer.clip_grad_norm,
        "ema_decay": new.get("EMA decay"),
        "betas": [new["beta1"], new["beta2"]] if "beta1" in new else None,
        "eps": new.get("eps"),
        "eval_every": move.run.eval_every,
        "log_every": new.get("log, updates"),
        "checkpoint_every": new.get("checkpoint, updates"),
    }
    return {key: value for key, value in found.items() if value is not None}
