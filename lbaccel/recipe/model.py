"""What the recipe builds from its settings: the backbone, the optimizer, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.batch.duration import Duration
from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.batch.stream import UpdateStream
from lbaccel.data.sources import ImageArray, Source
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.models import (
    SMALL_IMAGE,
    adapt_stem,
    create_backbone,
    load_exactly,
    preprocessing,
    read_weights,
)
from lbaccel.optim.groups import apply_lr_scale
from lbaccel.optim.learning_rate import check_scaling, peak_rate
from lbaccel.optim.momentum import correct_momentum
from lbaccel.optim.optimizers import create_optimizer, has_fused_step, notes
from lbaccel.optim.schedules import Schedule, extend_schedule, make_schedule, product
from lbaccel.recipe.growth import check_growth
from lbaccel.update.memory.budget import default_budget, memory_limit, parse_memory

Say = Callable[[str], object]


def check_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, where their numbers can be used at all."""
    s = dict(settings)
    s["auto_batch"] = s["global_batch_size"] == "auto"
    check_growth(s)
    if s["auto_batch"]:
        s["global_batch_size"] = s["min_batch_size"]
    above_zero = (
        "epochs",
        "eval_every",
        "log_every",
        "keep",
        "max_updates",
        "checkpoint_every",
        "max_hours",
    )
    for name in (*above_zero, "base_lr", "base_batch_size", "img_size", "head_lr_scale", "eps"):
        if s[name] is not None and not (s[name] > 0 and math.isfinite(s[name])):
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be above 0.")
    for name in ("drop_rate", "drop_path", "label_smoothing", "momentum", "ema_decay"):
        if s[name] is not None and not 0 <= s[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be in 0..1, below 1.")
    from_zero = ("weight_decay", "workers", "seed", "mixup", "cutmix", "warmup_epochs", "final_lr")
    for name in from_zero:
        if s[name] is not None and not 0 <= s[name] < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be a number from 0 on.")
    if s["seed"] >= 2**31:
        raise InputError(f"--seed {s['seed']} must be below 2^31.")
    if s["bn_momentum"] is not None and not 0 < s["bn_momentum"] <= 1:
        raise InputError(f"--bn-momentum {s['bn_momentum']} must be above 0 and at most 1.")
    if s["layer_decay"] is not None and not 0 < s["layer_decay"] <= 1:
        raise InputError(f"--layer-decay {s['layer_decay']} must be above 0 and at most 1.")
    for beta in s["betas"] or ():
        if not 0 <= beta < 1:
            raise InputError(f"--betas {beta} must be in 0..1, below 1.")
    for name in ("mean", "std"):
        if s[name] is not None and not all(math.isfinite(x) for x in s[name]):
            raise InputError(f"--{name} {s[name]} must be finite numbers.")
    _check_schedule(s)
    check_scaling(s)
    if s["memory"] is not None:
        parse_memory(s["memory"])
    if s["crop_pct"] is not None and not 0 < s["crop_pct"] <= 1:
        raise InputError(f"--crop-pct {s['crop_pct']} must be in 0..1.")
    for tracker in s["log_with"]:
        if tracker not in ("run_folder", "wandb"):
            raise InputError(f"--log-with {tracker} is not one of run_folder, wandb.")
    if s["precision"] == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU: there is none. Use bf16 or fp32.")
    return s


def _check_schedule(s: Mapping[str, Any]) -> None:
    """What `make_schedule` would refuse too, said in the names of the flags."""
    epochs, warmup_epochs = s["epochs"], s["warmup_epochs"]
    if s["warmup"] == "none" and warmup_epochs:
        raise InputError(
            f"--warmup none does not read --warmup-epochs {warmup_epochs:g}. Leave one of them out."
        )
    if warmup_epochs is not None and warmup_epochs > epochs:
        raise InputError(
            f"--warmup-epochs {warmup_epochs:g} is longer than the run of --epochs {epochs:g}: the "
            f"warmup must end within it. Use --warmup-epochs <= {epochs:g}, or --epochs >= "
            f"{warmup_epochs:g}."
        )
    given, schedule = s["milestones"], s["schedule"]
    flag, shown = f"--schedule {schedule}", " ".join(f"{m:g}" for m in given)
    if given and schedule in ("constant", "cosine") and s["batch_schedule"] is None:
        raise InputError(
            f"{flag} does not read --milestones {shown}. Use --schedule multistep, or "
            "leave them out."
        )
    if s["final_lr"] and schedule != "cosine":
        raise InputError(
            f"{flag} does not read --final-lr {s['final_lr']:g}. Use --schedule cosine, or leave "
            "it out."
        )
    if schedule == "step" and len(given) != 1:
        raise InputError(f"{flag} needs one --milestones, its period in epochs: --milestones 50.")
    if schedule == "multistep" and not given:
        raise InputError(f"{flag} needs --milestones in epochs, such as --milestones 30 60 80.")


def choose_norm_batch_size(
    s: Mapping[str, Any], *, has_batch_norm: bool, num_samples: int
) -> NormBatchSize:
    """The norm_batch_size given, by default 32 (Goyal et al. 2017: samples a worker)."""
    given = s["norm_batch_size"]
    if not has_batch_norm:
        if given is not None:
            raise InputError(
                f"--norm-batch-size {given}: {s['model']} has no BatchNorm. Leave it out."
            )
        return None
    if given is None:
        return min(32, s["global_batch_size"], num_samples)
    if given != "frozen" and given > num_samples:
        raise InputError(
            f"--norm-batch-size {given} is above the training set's {num_samples} samples: "
            f"BatchNorm can't see more than an update has. Use at most {num_samples}."
        )
    return given


def choose_micro_batch_size(s: Mapping[str, Any], *, norm_batch_size: NormBatchSize) -> int:
    """The micro_batch_size given; by default 64, cut to whole ghost batches or pairs."""
    if s["micro_batch_size"] not in (None, "auto"):
        return s["micro_batch_size"]
    unit = max(1, norm_batch_size) if isinstance(norm_batch_size, int) else 2
    return max(unit, 64 // unit * unit)


@contextmanager
def limit_for(s: Mapping[str, Any], device: torch.device, *, auto: bool) -> Iterator[str | None]:
    """Inside, the memory budget is enforced; yields a line that says so, or None.

    It is `memory`, by default what is free now less a margin: on a GPU always (a driver that
    spills into host memory would only get slow), on a CPU where a micro-batch is searched.
    """
    if s["memory"] is None and device.type == "cpu" and not auto:
        yield None
        return
    if s["memory"] is None:
        num_bytes = default_budget(device, ranks=local_world_size())
    else:
        num_bytes = parse_memory(s["memory"])
    with memory_limit(num_bytes, device) as line:
        yield line


def build_model(
    s: Mapping[str, Any],
    source: Source,
    *,
    num_classes: int,
    say: Say,
    load_weights: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone and what evaluation needs to know of its input; says where each comes from.

    Without `load_weights` (a resume brings its own) it is built alike, with fresh weights.
    """
    size, origin = s["img_size"], "flag"
    if size is None and isinstance(source.train, ImageArray):
        size, origin = source.train.images.shape[-1], "the images' own"
    path = Path(s["checkpoint"]) if s["checkpoint"] is not None and load_weights else None
    # Weights that must fit exactly are read after the stem is what they were trained with.
    weights = None if path is None or s["pretrained"] else read_weights(path)
    model = create_backbone(
        s["model"],
        num_classes=num_classes,
        num_channels=source.num_channels,
        img_size=size,
        pretrained=s["pretrained"] and load_weights,
        checkpoint=path if s["pretrained"] else None,
        drop_rate=s["drop_rate"],
        drop_path=s["drop_path"],
    )
    if s["bn_momentum"] is not None:
        _set_bn_momentum(model, s["bn_momentum"], s["model"])
    if size is None:
        size, origin = resolve_model_data_config(model)["input_size"][-1], "the model's"
    stem = "native"
    if s["stem"] == "small" or (s["stem"] == "auto" and size < SMALL_IMAGE and not s["pretrained"]):
        done = adapt_stem(model)
        if done is None and s["stem"] == "small":
            raise InputError(
                f"--stem small: {s['model']} is no ResNet or MobileNetV2. Leave it out."
            )
        if done is not None:
            stem = "small"
            say(
                f"stem: small, for images below {SMALL_IMAGE} px: {done} (plain timm needs "
                "lbaccel.models.adapt_stem before it loads the checkpoint)"
            )
    if path is not None and weights is not None:
        load_exactly(model, weights, s["model"], path)
    _try_images(model, s["model"], num_channels=source.num_channels, size=size)
    values, origins = preprocessing(model, num_channels=source.num_channels, given=s)
    if isinstance(source.train, ImageArray):
        values["crop_pct"] = 1.0  # evaluation takes images in memory whole
    shown = ", ".join(
        f"{key} {_short(values[key])} ({origins[key]})" for key in ("mean", "std", "interpolation")
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {s['model']}, {num_parameters / 1e6:.2f} M parameters, {num_classes} classes")
    say(f"images: {size} px ({origin}), {shown}")
    values |= {"img_size": size, "num_channels": source.num_channels, "stem": stem}
    return model, values | {"model": s["model"], "num_classes": num_classes}


def _set_bn_momentum(model: nn.Module, momentum: float, name: str) -> None:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not layers:
        raise InputError(f"--bn-momentum {momentum:g}: {name} has no BatchNorm. Leave it out.")
    for layer in layers:
        layer.momentum = momentum


def _try_images(model: nn.Module, name: str, *, num_channels: int, size: int) -> None:
    """One black image in evaluation mode: a size that the network can't take is found here."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, num_channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{name} can't take images of {size} px: {reason}. Give another --img-size."
        ) from error
    finally:
        model.train(was_training)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{x:.3f}" for x in value) + ")"
    return str(value)


def takes_fused_step(s: Mapping[str, Any], accelerator: Any, precision: str) -> bool:
    """Whether the optimizer's step is torch's fused one; DeepSpeed and FSDP step in their own."""
    plain = accelerator.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU")
    device_type = accelerator.device.type
    return (
        plain
        and s["fused_optimizer"] == "auto"
        and has_fused_step(s["optimizer"], device_type=device_type, precision=precision)
    )


def build_optimizer(
    s: Mapping[str, Any],
    model: nn.Module,
    *,
    plan: BatchPlan,
    stream: UpdateStream,
    factor: Schedule | None = None,
    fused: bool = False,
    say: Say,
) -> tuple[torch.optim.Optimizer, Schedule, dict[str, Any]]:
    """The optimizer at the scaled learning rate, the schedule, and the values they were made of.

    `factor` is multiplied into the schedule: what a growing batch does to the rate.
    """
    name = s["optimizer"].lower()
    rate = peak_rate(s, global_batch_size=plan.global_batch_size)
    say(rate.sentence)
    flat = s["warmup_start"] == "reference" and rate.lr == rate.base_lr
    if flat and rate.warmup_epochs and s["warmup"] != "none" and rate.rule != "adascale":
        say(
            f"warmup: none to see in its {rate.warmup_epochs:g} epochs, as --warmup-start "
            f"reference is the peak itself, {rate.lr:.6g}. --warmup-start zero starts from 0."
        )
    schedule = build_schedule(
        s,
        base_lr=rate.base_lr,
        peak_lr=rate.lr,
        warmup_epochs=rate.warmup_epochs,
        stream=stream,
    )
    if factor is not None:
        schedule = product(schedule, factor)
    optimizer = create_optimizer(
        model,
        name,
        lr=rate.lr,
        weight_decay=rate.weight_decay,
        momentum=s["momentum"],
        decay_all=s["decay_all"],
        layer_decay=s["layer_decay"],
        head_lr_scale=s["head_lr_scale"],
        lr_groups=s["lr_groups"],
        betas=s["betas"],
        eps=s["eps"],
        clip_grad_norm=s["clip_grad_norm"],
        fused=fused,
    )
    for line in notes(name, decay_all=s["decay_all"], clip_grad_norm=s["clip_grad_norm"]):
        say(line)
    apply_lr_scale(optimizer)
    if s["momentum_correction"]:
        held = correct_momentum(optimizer)
        say(f"momentum correction: {'on' if held else f'none, {name} holds no learning rate'}")
    values = {  # as asked, so that going on with them scales nothing twice
        "base_lr": rate.base_lr,
        "base_batch_size": rate.base_batch_size,
        "lr": rate.lr,
        "lr_scaling": rate.rule,
        "weight_decay": rate.weight_decay,
        "warmup_epochs": rate.asked_warmup_epochs,
    }
    return optimizer, schedule, values


def build_schedule(
    s: Mapping[str, Any],
    *,
    base_lr: float,
    peak_lr: float,
    warmup_epochs: float,
    stream: UpdateStream,
) -> Schedule:
    """The schedule of a run, with every extension that a resume gave it.

    Raises:
        InputError: a cosine is to go on past its end, and `extend` does not say how.
    """

    def end(epochs: float) -> int:
        return stream.samples_seen(stream.num_updates(epochs))

    def ending_at(epochs: float) -> Schedule:
        return make_schedule(
            total=Duration(samples=end(epochs)),
            base_lr=base_lr,
            peak_lr=peak_lr,
            global_batch_size=stream.global_batch_size,
            num_samples=stream.samples_per_epoch,
            decay=s["schedule"],
            warmup=s["warmup"],
            warmup_duration=Duration(epochs=warmup_epochs),
            start=s["warmup_start"],
            milestones=s["milestones"] if s["batch_schedule"] is None else (),  # its own
            gamma=s["gamma"],
            final_lr=s["final_lr"],
        )

    extensions = s.get("extensions", [])
    lengths = [*(before for before, _ in extensions), s["epochs"]]
    schedule = ending_at(lengths[0])
    for (before, how), after in zip(extensions, lengths[1:], strict=True):
        last = stream.samples_seen(stream.num_updates(before) - 1)
        longer = {"before": end(before), "after": end(after), "last": last}
        if s["schedule"] != "cosine" or how == "stretch":
            schedule = ending_at(after)  # steps and constants do not know the run's end
        elif how is not None:
            schedule = extend_schedule(schedule, how=how, final=s["final_lr"] / peak_lr, **longer)
        else:
            here = end(min(before, after))
            rates = [f(here) * peak_lr for f in (schedule, ending_at(after))]
            text = (
                f"--epochs {after:g}: the run's cosine ends at epoch {before:g}, and how the "
                "learning rate goes on is for you to say. Use "
            )
            if after > before:
                text += (
                    f"--extend restart (a new cosine from {peak_lr:.4g} at epoch {before:g} to "
                    f"{s['final_lr']:.4g} at {after:g}), --extend constant (stays at "
                    f"{schedule(last) * peak_lr:.4g}, that of the last update), or "
                )
            raise InputError(
                f"{text}--extend stretch (the cosine of {after:g} epochs from here on: at epoch "
                f"{min(before, after):g} it has {rates[1]:.4g} in place of {rates[0]:.4g})."
            )
    return schedule
