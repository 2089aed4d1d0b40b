"""A plan out of what a search found: the choice, its levers, alternatives and notes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lbaccel.optim.defaults import default_base_lr
from lbaccel.optim.scaling import choose_rule, scale_lr
from lbaccel.planning.candidates import Checkpointing
from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.cost.update import AUTOCAST, LossFn, taught_loss
from lbaccel.planning.estimate import Estimator, Untraceable
from lbaccel.planning.levers import levers
from lbaccel.planning.machine import NOTHING_TO_OFFLOAD, is_at_hand
from lbaccel.planning.network import Trained, image_shape, random_images
from lbaccel.planning.plan import Alternative, Plan
from lbaccel.planning.search import Choice, Search
from lbaccel.planning.sweep import SweepPoint, sweep

WORLD_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Wanted:
    """The contents of a plan beside the choice; `plan` describes each."""

    num_samples: int
    epochs: float
    observes: bool
    compare: bool
    sweeps: bool
    offloads: bool


def made(search: Search, trained: Trained, wanted: Wanted) -> Plan:
    """The plan of a search, with what is wanted beside the choice."""
    choice, notes = _chosen(search, trained, observes=wanted.observes)
    estimator, candidate, estimate = search.estimator, choice.candidate, choice.estimate
    batch = replace(estimator.plan, micro_batch_size=candidate.micro_batch_size)
    how: Checkpointing = candidate.checkpointing
    rule, _ = choose_rule(trained.optimizer_name)
    num_updates = math.ceil(wanted.num_samples * wanted.epochs / batch.global_batch_size)
    # other devices and precisions can't be measured here
    compare = wanted.compare and estimator.observe is None
    return Plan(
        model=trained.name,
        device=estimator.device,
        budget_gib=search.budget / GIB,
        fits=choice.fits,
        batch=batch,
        activation_checkpointing=how if isinstance(how, str) else "segments",
        segments=() if isinstance(how, str) else how,
        units=len(estimator.units),
        memory_format=candidate.memory_format,
        precision=estimator.precision,
        optimizer=trained.optimizer_name,
        fused_optimizer=estimator.steps_fused,
        lr=scale_lr(
            default_base_lr(trained.optimizer_name, pretrained=False),
            base_batch_size=256,
            global_batch_size=batch.global_batch_size,
            rule=rule,
        ),
        predicted_peak_gib=estimate.peak / GIB,
        predicted_seconds_per_update=choice.seconds,
        breakdown={part: num_bytes / GIB for part, num_bytes in estimate.breakdown.items()},
        levers=levers(search, choice) if compare else (),
        alternatives=_alternatives(search, choice, num_updates) if compare else (),
        num_updates=num_updates,
        points=_points(search, choice) if wanted.sweeps else (),
        why="" if choice.fits else _why(search, choice),
        zero_stage=None if estimator.zero is None else estimator.zero.stage,
        offload="none" if estimator.zero is None else estimator.zero.offload,
        activation_offload=candidate.offload,
        host_gib=estimate.host_bytes / GIB,
        workspaces=estimator.workspaces(),
        notes=(*notes, *_notes(estimator, how, wanted)),
    )


def _notes(estimator: Estimator, how: Checkpointing, wanted: Wanted) -> Iterator[str]:
    if wanted.offloads and estimator.device.kind == "cpu":
        yield NOTHING_TO_OFFLOAD
    if how != "none" and not isinstance(how, str) and len(estimator.units) < 4:
        yield "the blocks of this network are no chain: whole stages are recomputed"
    if estimator.device.source != "calibrated" and estimator.observe is None:
        yield (
            f"seconds are from {estimator.device.source} rates of {estimator.device.name}: they "
            "compare plans and forecast nothing; `lbaccel calibrate` on the device measures it"
        )


def _why(search: Search, choice: Choice) -> str:
    parts = choice.estimate.breakdown
    whole = ("weights", "gradients", "optimizer", "context", "teacher")
    fixed = sum(parts.get(key, 0) for key in whole)
    size = choice.candidate.micro_batch_size
    what = f"{size} samples" if search.unit == 1 else f"one group of {size} samples"
    helps = "recompute and offload" if search.pinned.host_bytes else "recompute"
    return (
        f"{what} with all the {helps} that helps needs {choice.estimate.peak / GIB:.2f} GiB, "
        f"{fixed / GIB:.2f} of it whatever the batch; the budget is {search.budget / GIB:.2f} GiB"
    )


def _points(search: Search, choice: Choice) -> list[SweepPoint]:
    candidate, peak = choice.candidate, choice.estimate.peak / GIB
    kept = 1.0 if candidate.checkpointing == "none" else 0.0
    chosen = SweepPoint(candidate.micro_batch_size, kept, peak, choice.seconds, chosen=True)
    return sweep(search, candidate.memory_format, chosen)


def _alternatives(search: Search, choice: Choice, num_updates: int) -> list[Alternative]:
    """The same contract on 1, 2, 4 and 8 such devices, with the micro-batch chosen or less."""
    found: list[Alternative] = []
    estimator, candidate = search.estimator, choice.candidate
    for world in WORLD_SIZES:
        if estimator.plan.num_groups(estimator.plan.global_batch_size) < world:
            continue
        batch = replace(
            estimator.plan, world_size=world, micro_batch_size=candidate.micro_batch_size
        )
        size = batch.largest_micro_batch()
        other = Search(estimator.of_world(world), search.budget, search.pinned)
        there = other.alike(replace(candidate, micro_batch_size=size))
        hours = num_updates * there.seconds / 3600
        found.append(
            Alternative(
                world_size=world,
                micro_batch_size=there.candidate.micro_batch_size,
                peak_gib=there.estimate.peak / GIB,
                seconds_per_update=there.seconds,
                hours=hours,
                gpu_hours=world * hours,
            )
        )
    return found


def _chosen(search: Search, trained: Trained, *, observes: bool) -> tuple[Choice, list[str]]:
    """The search's choice, by real micro-batches where the model can't be traced, and notes."""
    estimator, optimizer = search.estimator, trained.optimizer
    try:
        return search.run(), []
    except Untraceable as error:
        traced_only = (
            not observes or trained.embed is not None
        )  # what is observed is no whole batch
        if traced_only or not isinstance(optimizer, str) or not is_at_hand(estimator.device):
            raise
        from lbaccel.planning.observe import observer  # it needs accelerate

        model = trained.built()
        estimator.observe = observer(
            estimator,
            model,
            trained.make_batch or random_images(*image_shape(model, trained.img_size)),
            loss_fn=_real_loss(trained),
            optimizer=optimizer,
            clip_grad_norm=trained.clips,
        )
        name = estimator.device.name
        return search.run(), [f"{error.reason} Real micro-batches on {name} measured this plan."]


def _real_loss(trained: Trained) -> LossFn:
    """The loss on real tensors: a teacher goes where the images are, under the same autocast."""
    if trained.teacher is None:
        return trained.loss_fn
    teacher, dtype = copy.deepcopy(trained.teacher).eval(), AUTOCAST.get(trained.precision)

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        there = teacher.to(images.device)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            return there(images)

    return taught_loss(answers)
