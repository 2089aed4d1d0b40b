"""What a run of the recipe is made of, up to its first update; shared by all that run one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from lbaccel.batch.phases import Segment, growth_of
from lbaccel.batch.plan import BatchPlan
from lbaccel.data.augment import GroupMix
from lbaccel.data.loader import UpdateLoader
from lbaccel.data.pipelines import training_set
from lbaccel.data.sources import Source, open_source
from lbaccel.errors import InputError
from lbaccel.recipe import auto_plan, growth
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.auto_plan import Chosen
from lbaccel.recipe.model import (
    Say,
    build_model,
    build_optimizer,
    check_numbers,
    choose_micro_batch_size,
    choose_norm_batch_size,
    limit_for,
    takes_fused_step,
)
from lbaccel.update.accumulation import LossFn
from lbaccel.update.engine import LargeBatch
from lbaccel.update.normalization import has_batch_norm


@dataclass(frozen=True)
class Task:
    """Data, model, batch and loss: what comes before an optimizer."""

    source: Source
    model: nn.Module
    preprocessing: dict[str, Any]
    num_classes: int
    dtype: torch.dtype
    precision: str
    plan: BatchPlan
    chosen: Chosen
    searches: bool  # the micro-batch is still to be found by trial
    segments: tuple[Segment, ...]  # of the batch schedule; none without
    loader: UpdateLoader
    loss_fn: LossFn


def build_task(
    s: Mapping[str, Any], accelerator: Any, precision: str, *, say: Say, load_weights: bool = True
) -> Task:
    """Data, model, batch and loss of the settings, seeded by them.

    Args:
        s: from `check_numbers`.
        accelerator: its device and processes are planned for.
        precision: of the forward pass.
        say: prints a line.
        load_weights: False where a resume brings its own.

    Raises:
        InputError: settings that can't be used.
    """
    set_seed(s["seed"])
    dtype = torch.float64 if precision == "fp64" else torch.float32

    # -- data and model -----------------------------------------------------------------------
    source = open_source(s["data"], val_fraction=s["val_fraction"], seed=s["seed"])
    say(f"data: {source.description}")
    num_classes = len(source.train.classes)
    if s["num_classes"] is not None and s["num_classes"] < num_classes:
        raise InputError(
            f"--num-classes {s['num_classes']} is below the {num_classes} classes of "
            f"{s['data']}. Leave it out, or give at least {num_classes}."
        )
    num_classes = s["num_classes"] or num_classes
    model, preprocessing = build_model(
        s, source, num_classes=num_classes, say=say, load_weights=load_weights
    )
    model = model.to(dtype)

    # -- the batch ----------------------------------------------------------------------------
    mixes = bool(s["mixup"] or s["cutmix"])
    num_samples, size = len(source.train), preprocessing["img_size"]
    norm_batch_size = choose_norm_batch_size(
        s, has_batch_norm=has_batch_norm(model), num_samples=num_samples
    )
    segments = growth.segments_of(s, num_samples=num_samples, say=say)
    sizes = growth_of(segments)
    chosen = auto_plan.as_asked(s)
    if auto_plan.wants_plan(s):
        chosen = auto_plan.choose(
            {**s, "global_batch_size": growth.largest(s, segments)},
            model,
            accelerator=accelerator,
            norm_batch_size=norm_batch_size,
            num_samples=num_samples,
            image_shape=(source.num_channels, size, size),
            dtype=dtype,
            precision=precision,
            say=say,
        )
    model = auto_plan.apply(model, chosen, say=say)
    plan = BatchPlan(
        global_batch_size=s["global_batch_size"],
        micro_batch_size=chosen.micro_batch_size
        or choose_micro_batch_size(s, norm_batch_size=norm_batch_size),
        world_size=accelerator.num_processes,
        norm_batch_size=norm_batch_size,
        mix_pairs=mixes,
    )
    say(
        plan.explain(
            num_samples=num_samples,
            epochs=s["epochs"],
            last_update=s["last_update"],
            growth=sizes,
        )
    )
    plan = plan.capped(num_samples)
    if norm_batch_size == "frozen" and not (s["pretrained"] or s["checkpoint"]):
        say(
            "warning: BatchNorm is frozen in a network without pretrained weights, so it does not "
            "normalise at all. Use --norm-batch-size 32, or --pretrained."
        )
    mix = None
    if mixes:
        mix = GroupMix(num_classes, s["mixup"], s["cutmix"], s["label_smoothing"], s["seed"])
    loader = UpdateLoader(
        training_set(
            source.train,
            preprocessing=preprocessing,
            seed=s["seed"],
            mirror=source.name != "digits",
            auto_augment=s["auto_augment"],
        ),
        plan,
        rank=accelerator.process_index,
        seed=s["seed"],
        last_update=s["last_update"],
        growth=sizes,
        num_workers=s["workers"],
        transform=mix,
    )

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if chosen.memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        if targets.is_floating_point():  # soft targets of mixup, smoothed already
            return F.cross_entropy(model(images), targets.to(dtype))
        return F.cross_entropy(model(images), targets, label_smoothing=s["label_smoothing"])

    return Task(
        source=source,
        model=model,
        preprocessing=preprocessing,
        num_classes=num_classes,
        dtype=dtype,
        precision=precision,
        plan=plan,
        chosen=chosen,
        searches=s["micro_batch_size"] == "auto" and chosen.micro_batch_size is None,
        segments=segments,
        loader=loader,
        loss_fn=loss_fn,
    )


@dataclass(frozen=True)
class Built:
    """A recipe right before its first update: fresh weights, or those of `checkpoint`."""

    large_batch: LargeBatch
    loader: UpdateLoader
    optimizer: Any
    loss_fn: LossFn
    base_lr: float
    lr: float  # peak, of the global batch: `base_lr` scaled

    @property
    def largest_lr(self) -> float:
        """The peak rate of the group with the highest, such as a head at 10 times the rate."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


@contextmanager
def built(settings: Mapping[str, Any], *, say: Say) -> Iterator[Built]:
    """What `lbaccel train` would train with these settings; inside, its memory limit holds.

    Args:
        settings: of the recipe, as `read_settings` returns them.
        say: prints a line.

    Raises:
        InputError: settings that can't be used, or `resume`.
    """
    s = check_numbers(settings)
    if s["resume"] is not None:
        raise InputError(
            f"--resume {s['resume']}: this starts from fresh weights, or from a file: --checkpoint "
            "runs/NAME/checkpoints/last/model.safetensors."
        )
    accelerator, precision = make_accelerator(s["precision"])
    task = build_task(s, accelerator, precision, say=say)
    optimizer, _, values = build_optimizer(
        s,
        task.model,
        plan=task.plan,
        stream=task.loader.stream,
        fused=takes_fused_step(s, accelerator, precision),
        say=say,
    )
    task.model.to(accelerator.device)
    large_batch = LargeBatch(
        accelerator,
        task.plan,
        clip_grad_norm=s["clip_grad_norm"],
        bn_statistics=s["bn_statistics"],
        seed=s["seed"],
    )
    _, optimizer, loader = large_batch.prepare(task.model, optimizer, task.loader)
    with limit_for(s, accelerator.device, auto=s["micro_batch_size"] == "auto") as line:
        if line:
            say(line)
        if task.searches:
            found = large_batch.find_micro_batch_size(loader, task.loss_fn)
            say(f"micro-batch: {found} samples, the largest that fits\n{large_batch.plan}")
        yield Built(large_batch, loader, optimizer, task.loss_fn, values["base_lr"], values["lr"])
