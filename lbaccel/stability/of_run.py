"""How high a rate the curvature at a run's last weights allows, beside the rates that it had."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lbaccel.documents import json_in
from lbaccel.errors import InputError, RunFailed
from lbaccel.optim.scaling import is_sgd
from lbaccel.recipe.built import built
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.resume import read_run
from lbaccel.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    LAST,
    MODEL,
    PREPROCESSING,
    follow_link,
    weights_file,
)
from lbaccel.runs.read import Run
from lbaccel.stability.curvature import largest_curvature, sgd_momentum
from lbaccel.stability.limit import limits, rate_advice, rate_sentence, stable_rate


@dataclass(frozen=True)
class RunStability:
    """The stable rate at a run's last weights; rates are those of the group with the highest."""

    lambda_max: float
    residual: float  # an eigenvalue lies this near
    num_samples: int
    momentum: float
    nesterov: bool
    peak_lr: float  # of all updates that were logged
    last_lr: float

    @property
    def stable_rate(self) -> float:
        """Infinite where no positive curvature was found."""
        return stable_rate(self.lambda_max, momentum=self.momentum, nesterov=self.nesterov)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `lbaccel lr-find --json` has them; no number for infinity."""
        return asdict(self) | limits(
            self.lambda_max, momentum=self.momentum, nesterov=self.nesterov
        )

    def lines(self) -> list[str]:
        """How the run's rates stand to it."""
        form = {"momentum": self.momentum, "nesterov": self.nesterov}
        found = ["by the curvature at the run's last weights:"]
        names = {"peak": self.peak_lr, "last": self.last_lr}
        if self.peak_lr == self.last_lr:
            del names["peak"]
        for name, lr in names.items():
            text = rate_sentence(lr, self.lambda_max, num_samples=self.num_samples, **form)
            found.append(f"{name} {text}")
        found.append(f"    {rate_advice(self.peak_lr, self.lambda_max, **form)}")
        return found


def run_stability(folder: Path, one: Run, *, global_batch_size: int) -> RunStability | str:
    """lambda_max of the recipe of a run at its last weights, or why there is no figure.

    The run's recipe is built anew from its config.yaml, in one process and in fp32 (fp64 where it
    ran in that), and measured on the first samples of its order; nothing in the folder is written.

    Args:
        folder: the run's.
        one: its metrics, as `load_run` reads them.
        global_batch_size: of the run's last updates.
    """
    optimizer = one.config.get("optimizer")
    try:
        if isinstance(optimizer, str) and not is_sgd(optimizer):
            return _no_figure(optimizer)
        return _measured(folder, one, global_batch_size)
    except (InputError, RunFailed, OSError, ImportError) as error:
        return f"stable rate: not measured. {' '.join(str(error).split())}"


def _measured(folder: Path, one: Run, global_batch_size: int) -> RunStability | str:
    rates = [p.value for p in one.history.get("optim/lr", ()) if p.value is not None]
    if not rates:
        return "stable rate: not measured. No optim/lr in the run's metrics to compare with."
    settings = recipe_of(folder, global_batch_size=global_batch_size)
    with built(settings, say=lambda _: None) as b:
        form = sgd_momentum(b.optimizer)
        if form is None:
            return _no_figure(str(one.config.get("optimizer")))
        curvature = largest_curvature(b.large_batch, b.loader, b.loss_fn)
        highest = b.largest_lr / b.lr  # logged is the rate of scale 1
    return RunStability(
        lambda_max=curvature.lambda_max,
        residual=curvature.residual,
        num_samples=curvature.num_samples,
        momentum=form[0],
        nesterov=form[1],
        peak_lr=highest * max(rates),
        last_lr=highest * rates[-1],
    )


def recipe_of(folder: Path, *, global_batch_size: int) -> Settings:
    """The settings of a run at one batch, with its last weights, for one process of this machine.

    Raises:
        InputError: no run of the recipe, or no checkpoint with whole weights.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no {CONFIG}, so its recipe is not known.")
    weights = follow_link(folder / CHECKPOINTS / LAST) / weights_file(MODEL)
    if not weights.is_file():
        raise InputError(f"{folder} holds no {weights.relative_to(folder)}.")
    settings = read_run(folder)
    # neither growth of batch and rate nor the machine that trained enters the loss at given weights
    left_out = [row for row in OPTIONS.values() if row.over_time or row.plan or not row.of_run]
    stem = _stem(weights.parent / PREPROCESSING, settings.data.stem)
    found = settings.with_values(
        {
            **{row.name: row.default for row in left_out},
            "global_batch_size": global_batch_size,
            "lr_scaling": "none",
            "warmup": "none",
            "schedule": "constant",
            "pretrained": False,
            "checkpoint": str(weights),
            "stem": stem,
            "precision": "fp64" if settings.batch.precision == "fp64" else "fp32",
        }
    )
    return replace(found, extensions=())


def _stem(path: Path, asked: str) -> str:
    """The stem that the weights were trained with: "auto" meant "native" where pretrained."""
    try:
        stem = json_in(path)["stem"]
    except (OSError, ValueError, TypeError, KeyError):
        return asked
    return stem if stem in ("small", "native") else asked


def _no_figure(optimizer: str) -> str:
    return f"stable rate: known for SGD, not for {optimizer}"
