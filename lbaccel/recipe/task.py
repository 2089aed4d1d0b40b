"""Data, model, batch and loss of a run: all that comes before an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from lbaccel.batch.phases import Phase, growth_of
from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.data.augment import GroupMix
from lbaccel.data.broken import Broken
from lbaccel.data.identity import check_identity, identity_of
from lbaccel.data.loader import UpdateLoader
from lbaccel.data.order import check_repeats
from lbaccel.data.pipelines import training_set
from lbaccel.data.same_files import shared_files
from lbaccel.data.sources import Source
from lbaccel.errors import InputError
from lbaccel.recipe import auto_plan, growth
from lbaccel.recipe.auto_plan import Chosen, Workload
from lbaccel.recipe.checks import Checked, check_read_by_norm, check_read_from_data
from lbaccel.recipe.class_weights import check_unchanged, in_words, weights_of
from lbaccel.recipe.contract import VALUES
from lbaccel.recipe.images import Opened, sound_images
from lbaccel.recipe.kept_images import KeptImages, kept_images
from lbaccel.recipe.loss import Distillation, loss_of
from lbaccel.recipe.model import build_model
from lbaccel.recipe.sizes import choose_micro_batch_size, choose_norm_batch_size
from lbaccel.recipe.teacher import Teacher, read_teacher
from lbaccel.runs.alike import check_alike
from lbaccel.runs.ranks import decided, on_each_rank
from lbaccel.text import one_line, printable
from lbaccel.update.accumulation import LossFn
from lbaccel.update.compiled import compile_in_place
from lbaccel.update.engine import LargeBatch
from lbaccel.update.normalization import has_batch_norm

Say = Callable[[str], object]


COMPILED = (
    "compile: training runs through torch.compile; the first update of each size of micro-batch "
    "waits for it. Results agree to rounding; a predicted peak is that of the plain network"
)


@dataclass(frozen=True)
class Task:
    """Data, model, batch and loss: what comes before an optimizer."""

    source: Source
    skipped: tuple[Broken, ...]  # files that can't be read, and are none of the source's
    model: nn.Module
    preprocessing: dict[str, Any]
    num_classes: int
    dtype: torch.dtype
    precision: str
    plan: BatchPlan
    chosen: Chosen
    searches: bool  # the micro-batch is still to be found by trial
    phases: tuple[Phase, ...]  # of the batch schedule; none without
    loader: UpdateLoader
    loss_fn: LossFn
    class_weights: tuple[float, ...] | None = None  # of the loss, one an output
    teacher: Teacher | None = None  # whose answers are a part of the loss
    kept: KeptImages | None = None  # decoded images


def build_task(
    s: Checked,
    accelerator: Any,
    precision: str,
    *,
    say: Say,
    load_weights: bool = True,
    opened: Opened | None = None,
) -> Task:
    """Data, model, batch and loss of the settings, seeded by them.

    Args:
        s: all settings.
        accelerator: its device and processes are planned for.
        precision: of the forward pass.
        say: prints a line.
        load_weights: False where a resume brings its own.
        opened: the images, where they were opened before.

    Raises:
        InputError: settings that can't be used.
    """
    set_seed(s.run.seed)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    source, skipped = opened or sound_images(s, accelerator, say=say, fresh=load_weights)
    on_each_rank(accelerator, lambda: check_identity(source, s.identity, data=s.data.data))
    if accelerator.num_processes > 1:
        same = identity_of(source)
        check_alike(accelerator, {f"{key} of --data": value for key, value in same.items()})
    say(printable(f"data: {source.description}"))
    check_read_from_data(s, source)
    if accelerator.is_main_process and load_weights:  # a resume has said it
        _warn_of_shared_files(source, say=say)
    num_classes = num_classes_of(s.model.num_classes, source, data=s.data.data)
    weights = _class_weights(s, source, num_classes, accelerator, say=say)
    model, preprocessing = build_model(
        s.model,
        s.data,
        source,
        num_classes=num_classes,
        bn_momentum=s.batch.bn_momentum,
        say=say,
        load_weights=load_weights,
    )
    model, num_samples = model.to(dtype), len(source.train)
    teacher = read_teacher(
        s,
        accelerator,
        classes=source.train.classes,
        preprocessing=preprocessing,
        dtype=dtype,
        say=say,
    )
    normed = has_batch_norm(model)
    check_read_by_norm(s, normed)
    norm_batch_size = choose_norm_batch_size(
        s.batch, s.model, has_batch_norm=normed, num_samples=num_samples, say=say
    )
    phases = growth.phases_of(s.batch, s.rate, num_samples=num_samples, say=say)
    size, mixes = preprocessing["img_size"], bool(s.data.mixup or s.data.cutmix)
    of_plan = auto_plan.with_offload_settled(s.batch, accelerator, say=say)
    chosen = auto_plan.as_asked(of_plan)
    if auto_plan.wants_plan(of_plan):
        work = Workload(
            model,
            s.optimizer,
            largest_batch=min(growth.largest(s.batch, phases), num_samples),
            norm_batch_size=norm_batch_size,
            mix_pairs=mixes,
            image_shape=(source.num_channels, size, size),
            dtype=dtype,
            precision=precision,
            teacher=None if teacher is None else teacher.model,
        )
        chosen = auto_plan.choose(of_plan, work, accelerator, say=say)
    model = auto_plan.apply(model, chosen, norm_batch_size=norm_batch_size, say=say)
    if s.batch.compile:
        compile_in_place(model, accelerator.device)
        say(COMPILED)
    if teacher is not None:  # not before: the plan counts it among what is still to come
        teacher = teacher.placed(accelerator.device, memory_format=chosen.memory_format)
    world_size = accelerator.num_processes
    plan = _plan(s, chosen, norm_batch_size, num_samples, growth_of(phases), world_size, say=say)
    kept = kept_images(s.data.cache_images, source, accelerator, say=say)
    loader = _loader(
        s, source, plan, preprocessing, num_classes, growth_of(phases), accelerator, kept
    )
    return Task(
        source=source,
        skipped=skipped,
        model=model,
        preprocessing=preprocessing,
        num_classes=num_classes,
        dtype=dtype,
        precision=precision,
        plan=plan,
        chosen=chosen,
        searches=s.batch.micro_batch_size == "auto" and chosen.micro_batch_size is None,
        phases=phases,
        loader=loader,
        loss_fn=loss_of(
            s.data.loss,
            dtype=dtype,
            memory_format=chosen.memory_format,
            label_smoothing=s.data.label_smoothing,
            class_weights=None
            if weights is None
            else torch.tensor(weights, dtype=dtype, device=accelerator.device),
            distillation=_distillation(s, teacher),
        ),
        class_weights=weights,
        teacher=teacher,
        kept=kept,
    )


def _distillation(s: Checked, teacher: Teacher | None) -> Distillation | None:
    if teacher is None:
        return None
    return Distillation(teacher, s.data.distill_alpha, s.data.distill_temperature)


def _warn_of_shared_files(source: Source, *, say: Say) -> None:
    if same := shared_files(source):
        (val, train), count = same[0], len(same)
        are = "is a training image" if count == 1 else "are training images"
        say(
            f"warning: {count} of {len(source.val)} validation images {are} too, byte for byte "
            f"(as {one_line(val)} and {one_line(train)}), so validation looks better than new "
            "images will. Take them out of one of the two."
        )


def num_classes_of(asked: int | None, source: Source, *, data: str) -> int:
    """Outputs of the network: those asked for, or one for each class of the data.

    Raises:
        InputError: one class alone, or more classes than outputs.
    """
    there = len(source.train.classes)
    if there < 2:
        (only,) = source.train.classes
        raise InputError(
            f"--data {data} has one class, {only!r}: there is nothing to tell apart. Give the "
            "folder that holds a sub-folder for each class."
        )
    if asked is not None and asked < there:
        raise InputError(
            f"--num-classes {asked} is below the {there} classes of {data}. Leave it out, or give "
            f"at least {there}."
        )
    return asked or there


def _plan(
    s: Checked,
    chosen: Chosen,
    norm_batch_size: NormBatchSize,
    num_samples: int,
    sizes: Any,
    world_size: int,
    *,
    say: Say,
) -> BatchPlan:
    plan = BatchPlan(
        global_batch_size=s.batch.first_size,
        micro_batch_size=chosen.micro_batch_size
        or choose_micro_batch_size(s.batch, norm_batch_size=norm_batch_size),
        world_size=world_size,
        norm_batch_size=norm_batch_size,
        mix_pairs=bool(s.data.mixup or s.data.cutmix),
    )
    say(
        plan.explain(
            num_samples=num_samples,
            epochs=s.rate.epochs,
            last_update=s.batch.last_update,
            growth=sizes,
        )
    )
    _check_copies(s.data.aug_repeats, plan.capped(num_samples), num_samples, sizes, say=say)
    if not (s.model.pretrained or s.model.checkpoint):
        if s.model.train != "full":
            say(
                f"warning: --train {s.model.train} keeps most of a network that has learned nothing"
                ": its features are random. Use --pretrained, or --train full."
            )
        elif norm_batch_size == "frozen":
            say(
                "warning: BatchNorm is frozen in a network without pretrained weights, so it does "
                "not normalise at all. Use --norm-batch-size 32, or --pretrained."
            )
    return plan.capped(num_samples)


def _check_copies(repeats: int, plan: BatchPlan, num_samples: int, sizes: Any, *, say: Say) -> None:
    first = plan.global_batch_size
    updates = [first, *(min(size, num_samples) for _, size in sizes)]
    check_repeats(repeats, updates, asked=f"--aug-repeats {repeats}")
    if repeats > 1:
        say(
            f"copies: an update of {first} samples has {first // repeats} images, {repeats} times "
            f"each; an epoch shows {-(-num_samples // repeats)} of {num_samples} images"
        )


def _loader(
    s: Checked,
    source: Source,
    plan: BatchPlan,
    preprocessing: dict[str, Any],
    num_classes: int,
    sizes: Any,
    accelerator: Any,
    kept: KeptImages | None,
) -> UpdateLoader:
    data, seed, mix = s.data, s.run.seed, None
    if data.mixup or data.cutmix:
        mix = GroupMix(num_classes, data.mixup, data.cutmix, data.label_smoothing, seed)
    return UpdateLoader(
        training_set(
            source.train,
            preprocessing=preprocessing,
            seed=seed,
            mirror=source.name != "digits",
            auto_augment=data.auto_augment,
            scale=data.scale,
            ratio=data.ratio,
            hflip=data.hflip,
            color_jitter=data.color_jitter,
            random_erasing=data.random_erasing,
            padding=data.crop_padding_mode,
            cache=None if kept is None else kept.training,
        ),
        plan,
        rank=accelerator.process_index,
        seed=seed,
        last_update=s.batch.last_update,
        growth=sizes,
        repeats=data.aug_repeats,
        num_workers=data.workers,
        transform=mix,
    )


def _class_weights(
    s: Checked, source: Source, num_classes: int, accelerator: Any, *, say: Say
) -> tuple[float, ...] | None:
    classes, labels = source.train.classes, torch.as_tensor(np.asarray(source.train.labels))
    weights = decided(
        accelerator,
        lambda: weights_of(
            s.data.class_weights, labels=labels, classes=classes, num_classes=num_classes
        ),
    )
    if weights is not None:
        check_unchanged(weights, (s.contract or {}).get(VALUES, {}).get("class_weights"))
        say(in_words(weights, classes))
    return weights


def large_batch_of(s: Checked, accelerator: Any, task: Task, **parts: Any) -> LargeBatch:
    """The engine of a task; `parts` are those of `LargeBatch` that not every run has."""
    return LargeBatch(
        accelerator,
        task.plan,
        clip_grad_norm=s.optimizer.clip_grad_norm,
        bn_statistics=s.batch.bn_statistics,
        seed=s.run.seed,
        host_memory=s.batch.host_memory,
        **parts,
    )


def find_micro_batch(task: Task, large_batch: LargeBatch, loader: Any, *, say: Say) -> bool:
    """Search the micro-batch by trial, where no plan gave one; whether it was searched."""
    if task.searches:
        found = large_batch.find_micro_batch_size(loader, task.loss_fn)
        say(f"micro-batch: {found} samples, the largest that fits\n{large_batch.plan}")
    return task.searches
