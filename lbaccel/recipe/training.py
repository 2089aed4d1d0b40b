"""A run, built: data, model, optimizer, schedule, counters, log, and their folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from lbaccel.data.identity import identity_of
from lbaccel.data.loader import UpdateLoader
from lbaccel.data.pipelines import EvaluationBatches
from lbaccel.errors import InputError
from lbaccel.noise.auto_batch import AutoBatch
from lbaccel.noise.scale import NoiseScale
from lbaccel.optim.scheduler import AdaScaleLR, refresh
from lbaccel.optim.schedules import Schedule, product
from lbaccel.recipe import growth
from lbaccel.recipe.accelerator import zero_stage
from lbaccel.recipe.average import AverageNorm, average_of, norm_of_average
from lbaccel.recipe.checks import Checked
from lbaccel.recipe.class_weights import BALANCED
from lbaccel.recipe.evaluation import Room, validation_batches
from lbaccel.recipe.images import Opened
from lbaccel.recipe.measured import (
    build_auto_batch,
    build_noise_scale,
    build_scheduler,
    check_measurable,
    follows_noise,
    loss_dropout,
    rate_factor,
)
from lbaccel.recipe.optimizer import build_optimizer, build_schedule, takes_fused_step
from lbaccel.recipe.options_data import DataOptions
from lbaccel.recipe.rate import PeakRate, lines_of, rate_of
from lbaccel.recipe.saving import twice_at_most
from lbaccel.recipe.settings import (
    ASKED,
    CHANGES,
    EXTENSIONS,
    IDENTITY,
    ORIGIN,
    PLAN,
    TEACHER,
)
from lbaccel.recipe.task import Task, build_task, find_micro_batch, large_batch_of
from lbaccel.runs.alike import check_alike, digest_of
from lbaccel.runs.folder import DECISIONS, MANIFEST, atomic_write_text
from lbaccel.runs.length import Length
from lbaccel.runs.log import RunLog
from lbaccel.runs.notices import Circumstances, LossNotices
from lbaccel.runs.patience import Patience
from lbaccel.runs.ranks import on_each_rank
from lbaccel.runs.session import Session, load_weights
from lbaccel.runs.target import TargetWatch
from lbaccel.update.engine import LargeBatch
from lbaccel.update.loss_dropout import LossDropout

Say = Callable[[str], object]


class Hook(Protocol):
    """A part of a run that acts between epochs, such as an experimental one."""

    def before_epoch(self) -> str | None:
        """Act; a line for the user, or None."""
        ...


@dataclass(frozen=True)
class Training:
    """The parts of a run, ready for its next update."""

    settings: Checked
    accelerator: Any
    task: Task
    rate: PeakRate
    large_batch: LargeBatch
    loader: UpdateLoader
    scheduler: Any
    ema: Any  # of timm, or None
    norm_of_average: AverageNorm | None
    noise_scale: NoiseScale | None
    drops: LossDropout | None
    length: Length
    log: RunLog
    session: Session
    hooks: tuple[Hook, ...]
    validation: EvaluationBatches  # one for all evaluations, as its workers stay
    room: Room = field(default_factory=Room)  # that evaluations had

    def metrics(self) -> dict[str, float]:
        """Metrics of the parts that not every run has."""
        found = {} if self.noise_scale is None else self.noise_scale.metrics()
        if isinstance(self.scheduler, AdaScaleLR):
            found |= self.scheduler.metrics()
        if self.drops is not None:
            found |= {"optim/num_dropped": self.drops.num_dropped}
        return found

    def search(self, *, say: Say) -> None:
        """Find the micro-batch by trial, where no plan gave one; inside the memory's limit."""
        if find_micro_batch(self.task, self.large_batch, self.loader, say=say):
            needed = follows_noise(self.settings.batch, self.settings.rate)
            check_measurable(needed, self.large_batch.plan)

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings as the run takes them, and its plan: what config.yaml says of it."""
        s, task, plan = self.settings, self.task, self.large_batch.plan
        described = {
            "equation": str(plan),
            "world_size": plan.world_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "activation_checkpointing": task.chosen.checkpointing,
            "segments": [list(segment) for segment in task.chosen.segments],
            "activation_offload": [list(run) for run in task.chosen.offload],
            "memory_format": task.chosen.memory_format,
            "zero_stage": zero_stage(self.accelerator),
            "num_updates": self.length.planned,
            "norm_batch_size": plan.norm_batch_size,
            "lr": self.rate.lr,
        }
        if task.chosen.predicted_peak_gib is not None:
            described["predicted_peak_gib"] = task.chosen.predicted_peak_gib
        taken = {"precision": task.precision, "num_classes": task.num_classes}
        taken |= {k: task.preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")}
        taken["norm_batch_size"] = plan.norm_batch_size
        taken["milestones"] = growth.milestones(
            s.rate.milestones, rule=s.batch.batch_schedule, epochs=s.rate.epochs
        )
        if isinstance(s.data.class_weights, str) and s.data.class_weights != BALANCED:
            taken["class_weights"] = list(task.class_weights or ())  # the file may change
        if s.batch.micro_batch_size != "auto":
            taken["micro_batch_size"] = task.plan.micro_batch_size
        history = {
            ASKED: dict(s.asked),
            EXTENSIONS: [list(pair) for pair in s.extensions],
            IDENTITY: _identity(s, task),
            CHANGES: [dict(change) for change in s.changes],
        }
        if task.teacher is not None:
            history[TEACHER] = task.teacher.digest
        return {**s.values(), **self.rate.as_asked(), **taken, **history}, described

    def config(self, taken: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.yaml, from what `describe` gives."""
        once = ("resume", "extend", "allow_changed")  # said of one start of a run
        kept = {name: value for name, value in taken.items() if name not in once}
        origins = {name: self.settings.origin(name) for name in self.settings.values()}
        return {**kept, PLAN: plan, ORIGIN: origins}


def build_training(
    s: Checked,
    accelerator: Any,
    precision: str,
    *,
    resume_from: Path | None,
    say: Say,
    opened: Opened | None = None,
) -> Training:
    """All parts of the run that the settings ask for, with the state of a checkpoint in them.

    Args:
        s: all settings.
        accelerator: of all ranks.
        precision: of the forward pass.
        resume_from: a checkpoint to go on from.
        say: prints a line.
        opened: the images, where they were opened before.

    Raises:
        InputError: settings that can't be used.
    """
    new = resume_from is None
    task = build_task(s, accelerator, precision, say=say, load_weights=new, opened=opened)
    rate = rate_of(s, global_batch_size=task.plan.global_batch_size)
    factor = rate_factor(s.batch, rate, phases=task.phases, loader=task.loader)
    optimizer, schedule = _optimizer(s, task, rate, accelerator, factor=factor, say=say)
    if task.phases:
        stream, epochs = task.loader.stream, s.rate.epochs
        say(growth.explain(task.phases, stream=stream, epochs=epochs, lr=rate.lr))
    noise_scale = build_noise_scale(s, task.loader, accelerator, searches=task.searches, say=say)
    auto_batch = build_auto_batch(s.batch, task.loader, noise_scale)
    scheduler = build_scheduler(
        s.rate, optimizer, schedule, loader=task.loader, noise_scale=noise_scale
    )
    task.model.to(accelerator.device)
    ema = average_of(
        task.model,
        s.optimizer.ema_decay,
        warmup=s.optimizer.ema_warmup,
        num_updates=lambda: large_batch.num_updates,
    )
    if resume_from is not None:
        on_each_rank(accelerator, lambda: load_weights(resume_from, task.model, ema=ema))
        manifest = digest_of((resume_from / MANIFEST).read_text(encoding="utf-8"))
        check_alike(accelerator, {f"manifest of {resume_from}": manifest})
    loader = task.loader
    drops = loss_dropout(s.optimizer.loss_dropout, lambda: loader.stream, rate=s.rate)
    large_batch = large_batch_of(s, accelerator, task, drops=drops, noise_scale=noise_scale)
    _, optimizer, loader, scheduler = large_batch.prepare(
        task.model, optimizer, loader, scheduler, ema=ema
    )
    norm = norm_of_average(s.optimizer.ema_norm, ema, loader, accelerator, dtype=task.dtype)
    if norm is not None:
        say(str(norm))
    length = Length(
        loader,
        epochs=s.rate.epochs,
        max_updates=s.rate.max_updates,
        gaining=scheduler if isinstance(scheduler, AdaScaleLR) else None,
        base_batch_size=s.rate.base_batch_size,
    )
    log = RunLog(
        loader.stream,
        log_every=s.run.log_every,
        eval_every=s.run.eval_every,
        length=length,
        notices=LossNotices(circumstances(s, task, rate)),
        patience=Patience(s.run.patience, s.run.monitor),
        target=TargetWatch(s.run.target, s.run.monitor),
    )
    parts = {
        "optimizer": large_batch.optimizer_state(),
        "scheduler": scheduler,
        "counters": large_batch,
        "loader": loader,
        "log": log,
        "loss_dropout": drops,
        "auto_batch": auto_batch,
        "scaler": accelerator.scaler,
    }
    session = Session(
        accelerator,
        task.model,
        large_batch.whole_model,
        _present(parts),
        ema=ema,
        writes=twice_at_most(accelerator.device),
    )
    hooks: list[Hook] = [] if task.kept is None else [task.kept]
    if auto_batch is not None:
        hooks.append(GrowsWithNoise(auto_batch, scheduler, session))
    validation = validation_batches(
        task.source.val,
        accelerator,
        preprocessing=task.preprocessing,
        workers=s.data.workers,
        cache=None if task.kept is None else task.kept.validation,
    )
    training = Training(
        s, accelerator, task, rate, large_batch, loader, scheduler, ema, norm,
        noise_scale, drops, length, log, session, tuple(hooks), validation,
    )  # fmt: skip
    if resume_from is not None:
        done = session.restore(resume_from, say=say)
        _check_done(done, training)
        log.end_early(done)
    return training


def _optimizer(
    s: Checked,
    task: Task,
    rate: PeakRate,
    accelerator: Any,
    *,
    factor: Schedule | None = None,
    say: Say,
) -> tuple[Optimizer, Schedule]:
    """The optimizer, and its schedule times the factor of a growing batch."""
    for line in lines_of(s.rate, rate):
        say(line)
    schedule = build_schedule(
        s.rate,
        rate=rate,
        stream=task.loader.stream,
        steps_at=s.rate.milestones if s.batch.batch_schedule is None else (),  # it has its own
        extensions=s.extensions,
    )
    fused = takes_fused_step(s.optimizer, accelerator, task.precision)
    optimizer = build_optimizer(s.optimizer, task.model, rate=rate, fused=fused, say=say)
    return optimizer, schedule if factor is None else product(schedule, factor)


def _identity(s: Checked, task: Task) -> Mapping[str, Any]:
    """Of the images: as the run began with, with a digest of bytes once that is asked for."""
    of_bytes = s.data.data_digest == "bytes"
    if s.identity is not None and ("bytes" in s.identity or not of_bytes):
        return s.identity
    return identity_of(task.source, of_bytes=of_bytes)


def circumstances(s: Checked, task: Task, rate: PeakRate) -> Circumstances:
    """The facts of the run that a loss out of the ordinary may come from."""
    starts_from_weights = s.model.pretrained or s.model.checkpoint is not None
    own = getattr(task.model, "pretrained_cfg", None) or {}
    size = own.get("input_size") if starts_from_weights else None
    return Circumstances(
        num_classes=task.num_classes,
        img_size=task.preprocessing["img_size"],
        own_img_size=None if size is None else int(size[-1]),
        frozen=task.plan.norm_batch_size == "frozen",
        given_normalisation=s.data.mean is not None or s.data.std is not None,
        base_lr=s.rate.base_lr if s.rate.base_lr is not None else rate.lr,
        loss=s.data.loss,
        times_chance=1.0 if s.data.teacher is None else _times_chance(s.data),
    )


def _times_chance(data: DataOptions) -> float:
    return 1 - data.distill_alpha + data.distill_alpha * data.distill_temperature**2


def _present(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None}


def _check_done(done: int, training: Training) -> None:
    stop_at, planned = training.length.stop_at, training.length.planned
    if done <= stop_at:
        return
    given = f"--epochs {training.settings.rate.epochs:g} are {planned} updates"
    if stop_at < planned:
        given = f"--max-updates {stop_at}"
    raise InputError(f"{given}, and the run has done {done}. Use more of them.")


@dataclass(frozen=True)
class GrowsWithNoise:
    """The batch follows the critical batch size: a decision before each epoch, kept in a file."""

    auto_batch: AutoBatch
    scheduler: Any
    session: Session

    def before_epoch(self) -> str | None:
        """Decide; the decision in words, or None where the batch stays undecided."""
        decision = self.auto_batch.before_epoch()
        if decision is None:
            return None
        refresh(self.scheduler)
        folder = self.session.folder
        if folder is not None and self.session.accelerator.is_main_process:
            atomic_write_text(folder / DECISIONS, self.auto_batch.text())
        return str(decision)
