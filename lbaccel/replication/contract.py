"""From a recipe for many GPUs to the contract of one card: the arithmetic of it (no torch).

With b the per-GPU batch, W the GPUs, K the accumulation steps and m BatchNorm's momentum:

    global_batch_size = b W K
    norm_batch_size   = b, and b W under SyncBatchNorm
    bn_momentum       = 1 - (1 - m)^(1 / W), and m under SyncBatchNorm

The last one keeps the horizon of the running statistics. DDP sends rank 0's buffers to all, so
they move K times an update, by rank 0's batches: an update leaves the old statistics the share
(1 - m)^K. lbaccel moves them by all W K ghost batches, and (1 - bn_momentum)^(W K) is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lbaccel.errors import InputError
from lbaccel.optim.scaling import rule_named, scale_lr
from lbaccel.recipe.values import shown
from lbaccel.replication.many_gpus import (
    Average,
    Batch,
    Curve,
    Gap,
    Rate,
    Recipe,
    Translation,
)


@dataclass(frozen=True)
class Norms:
    """BatchNorm in a network: its layers, and the momenta that they have."""

    num_layers: int
    momenta: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Contract:
    """Settings of `lbaccel train`, why each is what it is, and what they can't say."""

    origin: str
    rows: tuple[Translation, ...]
    gaps: tuple[Gap, ...]
    unknown: tuple[str, ...]
    assumed: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Option to value, in order of the rows; values of None are left at the default."""
        found = {row.setting: row.value for row in self.rows if row.setting is not None}
        return {name: value for name, value in found.items() if value is not None}


@dataclass
class _Draft:
    rows: list[Translation] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def say(self, source: str, setting: str, value: Any, why: str) -> None:
        self.rows.append(Translation(source, setting, value, why))


def contract_of(recipe: Recipe, norms: Norms | None) -> Contract:
    """The contract that a recipe implies.

    Args:
        recipe: what a reader returned.
        norms: of its network; None where no network is named.

    Raises:
        InputError: BatchNorm over a single sample, or a rate that is no rate.
    """
    draft = _Draft()
    if recipe.model is not None:
        draft.say(recipe.said_model, "model", recipe.model, "timm's network of that name")
    _batch(recipe.batch, draft)
    _norm(recipe.batch, norms, draft)
    peak = _rate(recipe.rate, recipe.batch, draft)
    if recipe.curve is not None:
        _warmup(recipe.curve, peak, draft)
        _decay(recipe.curve, peak, draft)
    if recipe.average is not None:
        _average(recipe.average, norms, draft)
    return Contract(
        origin=recipe.origin,
        rows=(*draft.rows, *recipe.rows),
        gaps=(*draft.gaps, *recipe.gaps),
        unknown=recipe.unknown,
        assumed=recipe.assumed,
    )


def _batch(batch: Batch, draft: _Draft) -> None:
    b, w, k = batch.per_gpu, batch.gpus, batch.accumulation
    gpus = f"{w} GPU{'s' * (w > 1)}"
    draft.say(
        f"{batch.said}, {gpus}",
        "global_batch_size",
        batch.size,
        f"per-GPU batch x GPUs x accumulation = {b} x {w} x {k}",
    )
    draft.say("the loader", "last_update", batch.last, batch.last_why)


def _norm(batch: Batch, norms: Norms | None, draft: _Draft) -> None:
    b, w = batch.per_gpu, batch.gpus
    if norms is not None and not norms.num_layers:
        draft.rows.append(
            Translation(batch.said, None, None, "no norm_batch_size: the network has no BatchNorm")
        )
        return
    n = b * w if batch.sync_bn else b
    if n == 1:
        raise InputError(
            "a per-GPU batch of 1 with BatchNorm: a statistic over one sample is none. Give the "
            "samples of one forward on one GPU (--per-gpu-batch 32), --sync-bn yes where the "
            "recipe had it, or a network without BatchNorm."
        )
    said = "SyncBatchNorm" if batch.sync_bn else "no SyncBatchNorm"
    why = f"a statistic saw one GPU's micro-batch, {b} samples, whatever the accumulation"
    if batch.sync_bn:
        why = f"a statistic saw the micro-batches of all GPUs = {b} x {w}"
    draft.say(said, "norm_batch_size", n, why)
    if norms is None:
        draft.gaps.append(
            Gap(
                "a network",
                "the source names none",
                "--model NAME; leave norm_batch_size out for one without BatchNorm",
            )
        )
    if not batch.sync_bn and w > 1:
        _horizon(batch, norms, draft)


def _horizon(batch: Batch, norms: Norms | None, draft: _Draft) -> None:
    """BatchNorm's momentum for W times as many moves an update."""
    w, k = batch.gpus, batch.accumulation
    what = "running statistics of rank 0's batches alone (DDP broadcasts its buffers)"
    momenta = set(norms.momenta) if norms is not None else set()
    if len(momenta) != 1 or None in momenta:
        draft.gaps.append(
            Gap(
                what,
                "lbaccel moves them by every ghost batch, and the layers' momentum is "
                + ("unknown" if norms is None else "not one number"),
                f"their horizon is {w} times shorter in samples; bn_momentum 1 - (1 - m)^(1/{w}) "
                "keeps it",
            )
        )
        return
    m = momenta.pop()
    assert m is not None
    ours = float(f"{1 - (1 - m) ** (1 / w):.12g}")
    draft.say(
        f"momentum {m:g}, rank 0's batches",
        "bn_momentum",
        ours,
        f"1 - (1 - {m:g})^(1/{w}): {w * k} moves an update leave the old statistics (1 - m)^{k} "
        f"= {(1 - m) ** k:.4g}, as DDP's {k} of rank 0",
    )
    draft.gaps.append(
        Gap(
            what,
            "lbaccel moves them by every ghost batch of the update",
            f"the same horizon over {w} times as many samples: the same mean, less noise",
        )
    )


def _rate(rate: Rate | None, batch: Batch, draft: _Draft) -> float | None:
    """The rows of the learning rate; returns its peak."""
    if rate is None:
        draft.gaps.append(
            Gap("the learning rate", "the source does not say it", "--lr, or lbaccel's default")
        )
        return None
    if not (math.isfinite(rate.lr) and rate.lr > 0):
        raise InputError(f"{rate.said}: a learning rate is a number above 0. Correct the source.")
    base, rule = rate.base_batch_size or batch.size, rate.rule
    peak = scale_lr(rate.lr, base_batch_size=base, global_batch_size=batch.size, rule=rule)
    if rate.base_batch_size is None:
        why = f"absolute: the rate of an update of {batch.size} samples"
        draft.say(rate.said, "base_lr", rate.lr, why)
        draft.say(rate.said, "lr_scaling", "none", f"lr = base_lr = {peak:.6g}")
        return peak
    exponent = rule_named(rule).power
    power = "" if exponent == 1 else f"^({exponent})"
    draft.say(rate.said, "base_lr", rate.lr, f"at {base} samples an update")
    draft.say(rate.said, "base_batch_size", base, "the divisor")
    draft.say(
        rate.said,
        "lr_scaling",
        rule,
        f"lr = base_lr x (global / base){power} = {rate.lr:g} x ({batch.size} / {base}){power} "
        f"= {peak:.6g}",
    )
    return peak


def _warmup(curve: Curve, peak: float | None, draft: _Draft) -> None:
    draft.say(curve.said, "epochs", curve.epochs, "passes over the training set, warmup included")
    said = curve.said_warmup
    if not curve.warmup_epochs:
        draft.say(said, "warmup", "none", "no warmup")
        draft.say(said, "warmup_epochs", 0.0, "no warmup")
        return
    draft.say(said, "warmup", curve.warmup, f"{curve.warmup} rise to the peak")
    draft.say(said, "warmup_epochs", curve.warmup_epochs, "epochs on both sides")
    _start(curve, peak, draft)
    if curve.per_epoch and curve.warmup == "gradual":
        draft.gaps.append(
            Gap(
                "a learning rate that is constant within an epoch of the warmup",
                "lbaccel moves it at every update",
                f"the same line: epoch e of {curve.warmup_epochs:g} starts at the same rate",
            )
        )


def _start(curve: Curve, peak: float | None, draft: _Draft) -> None:
    """Where the warmup starts, as a learning rate."""
    said = curve.said_warmup
    if curve.start_is_share:
        if peak is None:
            draft.gaps.append(
                Gap(said, "it is a share of a rate that the source does not say", "--lr")
            )
            return
        value = float(f"{curve.start * peak:.12g}")
        why = f"share x peak = {shown(curve.start)} x {peak:.6g}"
    else:
        value, why = curve.start, "the learning rate of the first update"
    if peak is not None and value > peak:
        draft.gaps.append(
            Gap(
                f"a warmup from {value:g}, above the peak {peak:.6g}",
                "a warmup of the contract rises",
                "the peak from the first update on",
            )
        )
        value, why = peak, "not above the peak"
    draft.say(said, "warmup_start", value or "zero", why)


def _decay(curve: Curve, peak: float | None, draft: _Draft) -> None:
    found: dict[str, Callable[[Curve, float | None, _Draft], None]] = {
        "cosine": _cosine,
        "step": _step,
        "milestones": _milestones,
        "none": _constant,
    }
    if curve.decay in found:
        found[curve.decay](curve, peak, draft)
        return
    draft.say(curve.said, "schedule", "cosine", f"in place of {curve.decay}")
    draft.gaps.append(
        Gap(f"the decay {curve.decay}", "lbaccel has cosine, step, multistep, constant", "cosine")
    )


def _constant(curve: Curve, peak: float | None, draft: _Draft) -> None:
    draft.say(curve.said, "schedule", "constant", "no decay after the warmup")


def _cosine(curve: Curve, peak: float | None, draft: _Draft) -> None:
    draft.say(curve.said, "schedule", "cosine", "half a cosine to the end of the run")
    if curve.final_lr:
        draft.say(curve.said, "final_lr", curve.final_lr, "the rate at its end")
    if curve.counts_warmup and curve.warmup_epochs:
        gap, at = largest_gap(curve.warmup_epochs, curve.epochs)
        draft.gaps.append(
            Gap(
                "a cosine whose epoch 0 is the run's (no warmup prefix)",
                "lbaccel's begins where the warmup ends, at the peak",
                f"the same end; the two differ most at epoch {at}, by {gap:.2%} of the way from "
                "peak to end",
            )
        )
    if curve.per_epoch:
        draft.gaps.append(
            Gap(
                "a learning rate that is constant within an epoch of the cosine",
                "lbaccel moves it at every update",
                "the same cosine, read at the update and not at the epoch's start",
            )
        )


def largest_gap(warmup: float, epochs: float) -> tuple[float, int]:
    """Where half cosines over [0, E] and [W, E] differ most: the size, and the epoch e >= W.

        d(e) = |cos(pi e / E) - cos(pi (e - W) / (E - W))| / 2

    >>> largest_gap(0, 90)[0]
    0.0
    """
    first, last = math.ceil(warmup), math.floor(epochs)

    def gap(e: int) -> float:
        ours = math.cos(math.pi * (e - warmup) / max(epochs - warmup, 1e-9))
        return abs(math.cos(math.pi * e / epochs) - ours) / 2

    return max(((gap(e), e) for e in range(first, last + 1)), default=(0.0, first))


def _step(curve: Curve, peak: float | None, draft: _Draft) -> None:
    why = "gamma^floor((e - W) / period), counted from the end of the warmup"
    draft.say(curve.said, "schedule", "step", why)
    draft.say(curve.said, "milestones", [curve.period], "the period, epochs")
    draft.say(curve.said, "gamma", curve.gamma, "factor at each step")


def _milestones(curve: Curve, peak: float | None, draft: _Draft) -> None:
    points = [p for p in curve.milestones if p < curve.epochs]
    early = [p for p in points if p < curve.warmup_epochs]
    if early:
        draft.gaps.append(
            Gap(
                f"steps at epochs {shown(early)}, before the warmup ends",
                "the rate would fall before it has risen",
                f"all of them at epoch {curve.warmup_epochs:g}, the warmup's end",
            )
        )
        points = [max(p, curve.warmup_epochs) for p in points]
    if not points:
        _constant(curve, peak, draft)
        return
    draft.say(curve.said, "schedule", "multistep", "gamma^(milestones passed)")
    draft.say(curve.said, "milestones", points, "first epochs of the lower rates, of the run")
    draft.say(curve.said, "gamma", curve.gamma, "factor at each milestone")


def _average(average: Average, norms: Norms | None, draft: _Draft) -> None:
    each = average.decay ** (1 / average.every) if average.decay else 0.0
    value = float(f"{each:.12g}")
    if value >= 1:
        raise InputError(f"{average.said}: a decay of {average.decay:g} never moves the average.")
    why = average.formula
    if average.every > 1:
        why += f"; an update: (1 - alpha)^(1/{average.every}) = {each:.8g}"
    draft.say(average.said, "ema_decay", value, why)
    if average.warmup != "none":
        why = "the average begins with the weights of update 1"
        if average.warmup == "power":
            why += ", and after update u its decay is at most 1 - u^(-2/3)"
        draft.say(average.said, "ema_warmup", average.warmup, why)
    if norms is None or norms.num_layers:
        why = "its BatchNorm has averages of the running statistics"
        draft.say(average.said, "ema_norm", "average", why)
