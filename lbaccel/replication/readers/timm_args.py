"""timm's `args.yaml`: what its `train.py` writes beside a run, read as that script means it.

Semantics were read in timm's `train.py`, `timm/scheduler` and `timm/data/loader.py` of August 2026.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbaccel.errors import InputError
from lbaccel.network_arguments import network_arguments
from lbaccel.recipe.values import shown
from lbaccel.replication.many_gpus import (
    Average,
    Batch,
    Curve,
    Gap,
    Rate,
    Recipe,
    Translation,
    check_most_epochs,
    one_number_of_gpus,
)
from lbaccel.replication.readers.repeats import put, repeats
from lbaccel.replication.readers.timm_keys import (
    ALIKE,
    AT_DEFAULT,
    NEUTRAL,
    OWN_REASONS,
    READ,
    REQUIRED,
)
from lbaccel.replication.readers.timm_teacher import teacher_of

MOST_DROPS = 10_000  # of a rate in steps, each a milestone
WHY_LAST = {
    "drop": "timm's training loader has drop_last: an epoch's remainder is left out",
    "keep": "timm ends an epoch with the micro-batches that are left (last_accum_steps), one "
    "update of their own mean",
}


def is_timm_args(content: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is of this kind."""
    return "batch_size" in content and ("opt" in content or "sched" in content)


def read_timm_args(content: Mapping[str, Any], *, gpus: int | None, origin: str) -> Recipe:
    """The recipe in the mapping of an `args.yaml`.

    Args:
        content: the parsed YAML.
        gpus: processes it ran on; the file does not hold them.
        origin: the file's name, for messages.

    Raises:
        InputError: a key that the contract needs is missing or of no use.
    """
    missing = [key for key in REQUIRED if content.get(key) is None]
    if content.get("lr") is None and content.get("lr_base") is None:
        missing.append("lr or lr_base")
    if missing:
        raise InputError(
            f"{origin} has no {', '.join(missing)}: it is not the whole args.yaml that timm's "
            "train.py writes into a run's output folder. Give that file, or say it by hand: "
            "lbaccel replicate --per-gpu-batch 128 --gpus 8 --lr 0.4 ..."
        )
    a = READ | {key: value for key, value in content.items() if key in READ}
    known = READ.keys() | AT_DEFAULT.keys() | NEUTRAL
    last = "keep" if _whole(a, "grad_accum_steps", origin) > 1 else "drop"
    number = one_number_of_gpus(gpus, {}, origin=origin)
    rows, gaps = _rows(a), _gaps(a, content)
    batch = Batch(
        per_gpu=_whole(a, "batch_size", origin),
        gpus=number,
        accumulation=max(1, _whole(a, "grad_accum_steps", origin)),
        sync_bn=bool(a["sync_bn"]),
        said=f"batch_size {a['batch_size']}, grad_accum_steps {a['grad_accum_steps']}",
        last=last,
        last_why=WHY_LAST[last],
    )
    of_teacher = teacher_of(a)
    rows += of_teacher[0]
    gaps += of_teacher[1]
    put(repeats(f"aug_repeats {shown(a['aug_repeats'])}", a["aug_repeats"] or 0, batch), rows, gaps)
    if last == "keep":
        gaps.append(
            Gap(
                "drop_last of the loader before accumulation",
                "timm leaves out the samples of an incomplete per-GPU batch, and lbaccel's 'keep' "
                "trains them too",
                "last_update keep: up to per-GPU batch x GPUs - 1 samples more an epoch",
            )
        )
    return Recipe(
        origin=f"timm, {origin}",
        model=str(a["model"]),
        said_model=f"model {a['model']}",
        batch=batch,
        rate=_rate(a),
        curve=_curve(a, gaps),
        average=_average(a),
        rows=tuple(rows),
        gaps=tuple(gaps),
        unknown=tuple(f"{k}: {shown(content[k])}" for k in content if k not in known),
        assumed=tuple(
            f"{key} {shown(value)}"
            for key, value in READ.items()
            if value and key not in content and key not in ALIKE
        ),
    )


def _whole(a: Mapping[str, Any], key: str, origin: str) -> int:
    value = a[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key}: {value!r} in {origin} is not a whole number of at least 1.")
    return value


def _rate(a: Mapping[str, Any]) -> Rate:
    if a["lr"]:
        return Rate(said=f"lr {shown(float(a['lr']))}", lr=float(a["lr"]))
    name = str(a["opt"]).lower()
    rule = a["lr_base_scale"] or ("sqrt" if "ada" in name or "lamb" in name else "linear")
    scale = a["lr_base_scale"] or f"empty: {rule} for {name}"
    return Rate(
        said=f"lr_base {shown(a['lr_base'])}, lr_base_size {a['lr_base_size']}, "
        f"lr_base_scale {scale}",
        lr=float(a["lr_base"]),
        base_batch_size=int(a["lr_base_size"]),
        rule="sqrt" if rule == "sqrt" else "linear",
    )


def _curve(a: Mapping[str, Any], gaps: list[Gap]) -> Curve:
    prefix, warmup = bool(a["warmup_prefix"]), float(a["warmup_epochs"])
    sched, epochs = str(a["sched"]), float(a["epochs"])
    total = epochs + warmup if prefix else epochs
    period, milestones = float(a["decay_epochs"]), tuple(a["decay_milestones"])
    offset = warmup if prefix else 0.0
    said = {
        "step": f"decay_epochs {shown(period)}, decay_rate {shown(a['decay_rate'])}",
        "multistep": f"decay_milestones {shown(milestones)}, decay_rate {shown(a['decay_rate'])}",
    }.get(sched, f"min_lr {shown(a['min_lr'])}")
    cooldown = float(a["cooldown_epochs"] or 0)
    if cooldown and sched in ("cosine", "tanh", "poly"):
        gaps.append(
            Gap(
                f"cooldown_epochs {cooldown:g} at min_lr",
                "a cosine of the contract ends with the run",
                f"the run ends at epoch {total:g}; lbaccel train --resume RUN --epochs "
                f"{total + cooldown:g} --extend constant goes on at the last update's rate",
            )
        )
    decay, points = sched, ()
    if sched == "multistep":  # bisect at t + 1: milestone m applies from epoch m - 1 on
        decay, points = "milestones", tuple(m - 1 + offset for m in milestones)
    elif sched == "step" and not (prefix or warmup == 0):
        # timm has gamma^(t // period) at epoch t of the run: a milestone wherever t // period grows
        check_most_epochs("epochs", epochs)
        if not (period > 0 and epochs / period <= MOST_DROPS):
            raise InputError(
                f"decay_epochs {period:g} over {epochs:g} epochs: the rate must fall after more "
                f"than 0 epochs, and at most {MOST_DROPS:,} times. Correct decay_epochs."
            )
        counts = [int(t // period) for t in range(math.ceil(epochs))]
        steps = [(t, counts[t] - counts[t - 1]) for t in range(1, len(counts))]
        decay, points = "milestones", tuple(float(t) for t, n in steps for _ in range(n))
    return Curve(
        said=f"sched {sched}, epochs {a['epochs']}, {said}",
        said_warmup=f"warmup_epochs {shown(warmup)}, warmup_lr {shown(a['warmup_lr'])}, "
        f"warmup_prefix {shown(prefix)}",
        epochs=total,
        warmup_epochs=warmup,
        start=float(a["warmup_lr"]),
        decay=decay,
        counts_warmup=not prefix,
        period=period,
        milestones=points,
        gamma=float(a["decay_rate"]),
        final_lr=float(a["min_lr"] or 0.0) if sched == "cosine" else 0.0,
        per_epoch=not a["sched_on_updates"],
    )


def _average(a: Mapping[str, Any]) -> Average | None:
    if not a["model_ema"]:
        return None
    decay = float(a["model_ema_decay"])
    return Average(
        said=f"model_ema true, model_ema_decay {decay:g}"
        + ", model_ema_warmup true" * bool(a["model_ema_warmup"]),
        decay=decay,
        warmup="power" if a["model_ema_warmup"] else "first",
        formula="timm moves it once an update, and so does lbaccel",
    )


def _rows(a: Mapping[str, Any]) -> list[Translation]:
    rows: list[Translation] = []

    def same(key: str, setting: str, why: str, *, when: bool = True) -> None:
        if when:
            value = a[key]
            value = list(value) if isinstance(value, (list, tuple)) else value
            rows.append(Translation(f"{key} {shown(value)}", setting, value, why))

    same("opt", "optimizer", "timm's name on both sides")
    same("momentum", "momentum", "the same argument of timm's optimizer factory")
    same("weight_decay", "weight_decay", "biases and norms left out on both sides")
    same("layer_decay", "layer_decay", "the same argument", when=a["layer_decay"] is not None)
    if a["clip_grad"] is not None and a["clip_mode"] == "norm":
        why = "both clip the norm of the gradient of the whole update"
        same("clip_grad", "clip_grad_norm", why)
    why = "1 - s + s / C and s / C, on both sides; in timm s is 0.1 where nothing is said"
    same("smoothing", "label_smoothing", why)
    same("mixup", "mixup", "alpha of Beta(alpha, alpha)", when=bool(a["mixup"]))
    same("cutmix", "cutmix", "alpha of Beta(alpha, alpha)", when=bool(a["cutmix"]))
    same("drop", "drop_rate", "dropout before the classifier", when=bool(a["drop"]))
    same("drop_path", "drop_path", "stochastic depth", when=bool(a["drop_path"]))
    same("aa", "auto_augment", "timm's policy on both sides", when=bool(a["aa"]))
    for key in ("scale", "ratio", "hflip"):
        same(key, key, "of timm's training transform", when=not _is_default(a[key], ALIKE[key]))
    if not a["aa"] and not _is_default(a["color_jitter"], ALIKE["color_jitter"]):
        said = f"color_jitter {shown(a['color_jitter'])}"
        why = "brightness, contrast and saturation of timm's training transform"
        rows.append(Translation(said, "color_jitter", float(a["color_jitter"] or 0.0), why))
    same("reprob", "random_erasing", "timm's, filled with noise", when=bool(a["reprob"]))
    if a["bce_loss"]:
        why = "timm's BinaryCrossEntropy, the mean over classes"
        rows.append(Translation("bce_loss true", "loss", "bce", why))
    if a["model_kwargs"]:
        kwargs = network_arguments(a["model_kwargs"], where="model_kwargs")
        said = f"model_kwargs {shown(kwargs)}"
        rows.append(Translation(said, "model_kwargs", kwargs, "arguments of timm's network"))
    same("num_classes", "num_classes", "outputs", when=a["num_classes"] is not None)
    size = a["img_size"] or (a["input_size"] or [None])[-1]
    if size is not None:
        key = "img_size" if a["img_size"] else "input_size"
        rows.append(Translation(f"{key} {shown(a[key])}", "img_size", int(size), "pixels a side"))
    for key in ("mean", "std", "crop_pct"):
        same(key, key, "as given", when=a[key] is not None)
    good = a["interpolation"] in ("bilinear", "bicubic")
    same("interpolation", "interpolation", "of evaluation, and here of training too", when=good)
    precision = "fp32"
    if a["amp"]:
        precision = "bf16" if a["amp_dtype"] == "bfloat16" else "fp16"
    said = f"amp {shown(a['amp'])}" + f", amp_dtype {a['amp_dtype']}" * bool(a["amp"])
    rows.append(Translation(said, "precision", precision, "autocast of the forward pass, or none"))
    if a["pretrained_path"]:
        why = "the file's weights with a new classifier where it does not fit"
        rows.append(Translation(f"pretrained_path {a['pretrained_path']}", "pretrained", True, why))
        same("pretrained_path", "checkpoint", why)
    else:
        same("pretrained", "pretrained", "timm's weights", when=bool(a["pretrained"]))
        when = bool(a["initial_checkpoint"])
        same("initial_checkpoint", "checkpoint", "the file must fit the model", when=when)
    same("seed", "seed", "the number; orders and draws are lbaccel's own")
    same("checkpoint_hist", "keep", "timm keeps the best, lbaccel the newest and the best")
    root = a["data_dir"] or a["data"]
    if root and not a["dataset"]:
        why = "sub-folders a class, under train/ and val/"
        rows.append(Translation(f"data_dir {root}", "data", f"folder:{root}", why))
        why = "timm's readers leave photographs as they are stored"
        rows.append(Translation("readers", "exif_orientation", False, why))
    if a["channels_last"]:
        why = "of the plan: no effect on the result"
        rows.append(Translation("channels_last true", None, None, why))
    if a["grad_checkpointing"]:
        why = "of the plan: recompute has no effect on the result"
        rows.append(Translation("grad_checkpointing true", None, None, why))
    return rows


def _gaps(a: Mapping[str, Any], content: Mapping[str, Any]) -> list[Gap]:
    gaps: list[Gap] = []
    for key, default in AT_DEFAULT.items():
        value = content.get(key, default)
        if not _is_default(value, default):
            gaps.append(
                Gap(f"{key} {shown(value)}", *OWN_REASONS.get(key, _no_setting(key, default)))
            )
    if a["clip_grad"] is not None and a["clip_mode"] != "norm":
        gaps.append(
            Gap(
                f"clip_grad {shown(a['clip_grad'])} with clip_mode {a['clip_mode']}",
                "lbaccel clips the norm of the whole gradient alone",
                "no clipping; a number for clip_grad_norm is another rule",
            )
        )
    if (a["mixup"] or a["cutmix"]) and a["mixup_mode"] != "elem":
        gaps.append(
            Gap(
                f"mixup_mode {a['mixup_mode']}",
                "lbaccel draws lambda for each sample, timm one for a GPU's batch or pair",
                "mixup and cutmix of the same alpha; sample i of a ghost batch still meets sample "
                "g - 1 - i, as in timm",
            )
        )
    if a["train_interpolation"] == "random":
        gaps.append(
            Gap(
                "train_interpolation random (bilinear or bicubic, drawn an image)",
                "the recipe has one interpolation",
                "the model's, or interpolation",
            )
        )
    if a["reprob"] and (a["remode"], a["recount"]) != (ALIKE["remode"], ALIKE["recount"]):
        gaps.append(
            Gap(
                f"remode {a['remode']}, recount {a['recount']} of random erasing",
                "lbaccel erases one box, and fills it with noise",
                "random_erasing of the same probability",
            )
        )
    if a["dataset"]:
        gaps.append(
            Gap(
                f"dataset {a['dataset']}",
                "lbaccel's sources are folders, parquet files, CIFAR and digits",
                "data folder:PATH or parquet:PATH with the same images",
            )
        )
    return gaps


def _is_default(value: Any, default: Any) -> bool:
    if not default and not value:
        return True
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        return len(default) == len(value) and all(map(math.isclose, default, value))
    return value == default


def _no_setting(key: str, default: Any) -> tuple[str, str]:
    usual = "leaving it out" if not default else f"timm's default, {shown(default)}"
    return f"lbaccel train has no setting for {key}", usual
