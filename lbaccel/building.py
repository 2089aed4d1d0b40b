"""What a run of the recipe is made of, up to its first update: for what tries a recipe out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.nn import functional as F

from lbaccel import auto_plan
from lbaccel.accelerator import make_accelerator
from lbaccel.accumulation import LossFn
from lbaccel.batch import BatchPlan
from lbaccel.data.augment import GroupMix
from lbaccel.data.loader import UpdateLoader
from lbaccel.data.pipelines import training_set
from lbaccel.data.sources import open_source
from lbaccel.engine import LargeBatch
from lbaccel.errors import InputError
from lbaccel.normalization import has_batch_norm
from lbaccel.recipe import (
    Say,
    build_model,
    build_optimizer,
    check_numbers,
    choose_micro_batch_size,
    choose_norm_batch_size,
    limit_for,
    takes_fused_step,
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
    dtype = torch.float64 if precision == "fp64" else torch.float32
    set_seed(s["seed"])
    source = open_source(s["data"], val_fraction=s["val_fraction"], seed=s["seed"])
    say(f"data: {source.description}")
    num_classes = s["num_classes"] or len(source.train.classes)
    model, preprocessing = build_model(s, source, num_classes=num_classes, say=say)
    model = model.to(dtype)
    num_samples, size = len(source.train), preprocessing["img_size"]
    norm_batch_size = choose_norm_batch_size(
        s, has_batch_norm=has_batch_norm(model), num_samples=num_samples
    )
    chosen = auto_plan.as_asked(s)
    if auto_plan.wants_plan(s):
        chosen = auto_plan.choose(
            s,
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
    mixes = bool(s["mixup"] or s["cutmix"])
    plan = BatchPlan(
        global_batch_size=s["global_batch_size"],
        micro_batch_size=chosen.micro_batch_size
        or choose_micro_batch_size(s, norm_batch_size=norm_batch_size),
        world_size=accelerator.num_processes,
        norm_batch_size=norm_batch_size,
        mix_pairs=mixes,
    ).capped(num_samples)
    say(str(plan))
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
        num_workers=s["workers"],
        transform=mix,
    )
    optimizer, _, values = build_optimizer(
        s,
        model,
        plan=plan,
        stream=loader.stream,
        fused=takes_fused_step(s, accelerator, precision),
        say=say,
    )
    model.to(accelerator.device)
    large_batch = LargeBatch(
        accelerator,
        plan,
        clip_grad_norm=s["clip_grad_norm"],
        bn_statistics=s["bn_statistics"],
        seed=s["seed"],
    )
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if chosen.memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        if targets.is_floating_point():  # soft targets of mixup, smoothed already
            return F.cross_entropy(model(images), targets.to(dtype))
        return F.cross_entropy(model(images), targets, label_smoothing=s["label_smoothing"])

    auto = s["micro_batch_size"] == "auto"
    with limit_for(s, accelerator.device, auto=auto) as line:
        if line:
            say(line)
        if auto and chosen.micro_batch_size is None:
            found = large_batch.find_micro_batch_size(loader, loss_fn)
            say(f"micro-batch: {found} samples, the largest that fits\n{large_batch.plan}")
        yield Built(large_batch, loader, optimizer, loss_fn, values["base_lr"], values["lr"])
