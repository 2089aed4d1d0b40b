"""torchvision's reference flags (`references/classification/train.py`), read as that script does.

Semantics were read in torchvision's script of 2022 (0.13) and after, where SGD with and without
Nesterov, the adjusted average of weights and repeated augmentation are.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any

from lbaccel.errors import InputError
from lbaccel.recipe.values import nearest_word, shown
from lbaccel.replication.many_gpus import (
    Average,
    Batch,
    Curve,
    Gap,
    Rate,
    Recipe,
    Translation,
    one_number_of_gpus,
)
from lbaccel.replication.readers.repeats import put, repeats
from lbaccel.replication.readers.torchvision_gaps import gaps_of
from lbaccel.replication.readers.torchvision_names import (
    ALIASES,
    FLAGS,
    LAUNCHER,
    MODELS,
    NEUTRAL,
    SWITCH,
)


def split_command(text: str) -> list[str]:
    """The words of a command line in a file: comments, line ends and their backslashes left out."""
    return shlex.split(text.replace("\\\n", " "), comments=True)


def read_torchvision_flags(
    words: Sequence[str],
    *,
    gpus: int | None,
    model: str | None = None,
    origin: str = "torchvision's flags",
) -> Recipe:
    """The recipe in a command line, with or without its launcher.

    Args:
        words: such as `torchrun --nproc_per_node=8 train.py --model resnet50 ...`.
        gpus: processes it ran on, where the command does not say so.
        model: timm's name of the network, where torchvision's has none known here.
        origin: in messages.

    Raises:
        InputError: a flag that the script does not have, or numbers of GPUs that contradict.
    """
    launcher, flags = _split_launcher(words)
    given = _parse(flags, origin)
    a = {name.replace("-", "_"): default for name, (_, default) in FLAGS.items()} | given
    number = one_number_of_gpus(gpus, _stated_gpus(launcher, a), origin=origin)
    gaps = gaps_of(a)
    batch = Batch(
        per_gpu=a["batch_size"],
        gpus=number,
        sync_bn=a["sync_bn"],
        said=f"--batch-size {a['batch_size']}",
        last="keep",
        last_why="the loader keeps the last, short batch of an epoch, at the whole learning rate",
    )
    gaps.append(
        Gap(
            f"DistributedSampler's padding, up to {number - 1} samples twice an epoch",
            "lbaccel takes each sample once",
            "last_update keep; and BatchNorm cuts that short update into equal ghost batches of "
            "at most norm_batch_size, where each GPU saw its share",
        )
    )
    rows = _rows(a)
    if a["ra_sampler"]:
        said = f"--ra-sampler --ra-reps {a['ra_reps']}"
        put(repeats(said, a["ra_reps"], batch), rows, gaps)
    timm_name = model or MODELS.get(a["model"], a["model"])
    if not model and timm_name != a["model"]:
        said_model = f"--model {a['model']}, timm's {timm_name}"
    else:
        said_model = f"--model {a['model']}"
    return Recipe(
        origin=origin,
        model=timm_name,
        said_model=said_model,
        batch=batch,
        rate=Rate(said=f"--lr {shown(a['lr'])}", lr=a["lr"]),
        curve=_curve(a),
        average=_average(a, batch, gaps),
        rows=tuple(rows),
        gaps=tuple(gaps),
        assumed=_assumed(a, given),
    )


def _assumed(a: dict[str, Any], given: dict[str, Any]) -> tuple[str, ...]:
    """Defaults that the command leaves out and that have an effect in it."""
    unread = {"ra-magnitude", "augmix-severity", "ra-reps"}
    if a["lr_scheduler"].lower() != "steplr":
        unread |= {"lr-step-size"}
    if a["lr_scheduler"].lower() == "cosineannealinglr":
        unread |= {"lr-gamma"}
    if not a["lr_warmup_epochs"]:
        unread |= {"lr-warmup-method", "lr-warmup-decay"}
    if not a["model_ema"]:
        unread |= {"model-ema-steps", "model-ema-decay"}
    return tuple(
        f"--{name} {shown(default)}"
        for name, (kind, default) in FLAGS.items()
        if default and kind is not SWITCH and name not in unread
        if name.replace("-", "_") not in given
    )


class _FlagParser(argparse.ArgumentParser):
    origin = ""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            known = [f"--{name}" for name in [*FLAGS, *NEUTRAL]]
            near = nearest_word(flag, known)
            message = (
                f"{flag} is no flag of torchvision's references/classification/train.py.{near} "
                "Correct it, or leave it out"
            )
        raise InputError(f"{self.origin}: {message}.")


def _parse(words: Sequence[str], origin: str) -> dict[str, Any]:
    """The flags that were typed; abbreviations as argparse takes them in the script too."""
    parser = _FlagParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.origin = origin
    kinds = {name: kind for name, (kind, _) in FLAGS.items()} | NEUTRAL | LAUNCHER
    for name, kind in kinds.items():
        names = [f"--{name}", *ALIASES.get(name, ()), *(("-j",) if name == "workers" else ())]
        dest = name.replace("-", "_")
        if kind is SWITCH:
            parser.add_argument(*names, dest=dest, action="store_true")
        else:
            parser.add_argument(*names, dest=dest, type=kind)
    return vars(parser.parse_args(list(words)))


def _split_launcher(words: Sequence[str]) -> tuple[list[str], list[str]]:
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    cut = scripts[-1] + 1 if scripts else 0
    return list(words[:cut]), list(words[cut:])


def _stated_gpus(launcher: Sequence[str], a: dict[str, Any]) -> dict[str, int]:
    """Every number of GPUs that the command states, by its own words."""
    stated: dict[str, int] = {}
    text = " ".join(launcher)
    found = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", text)
    nodes = re.search(r"--nnodes[= ](\d+)", text)
    if found:
        count = int(found[1]) * (int(nodes[1]) if nodes else 1)
        stated[found[0] + (f" {nodes[0]}" if nodes else "")] = count
    if "ngpus" in a or "nodes" in a:
        ngpus, nodes_given = a.get("ngpus", 8), a.get("nodes", 2)
        stated[f"--ngpus {ngpus} --nodes {nodes_given}"] = ngpus * nodes_given
    if a["world_size"] is not None:
        stated[f"--world-size {a['world_size']}"] = a["world_size"]
    return stated


def _curve(a: dict[str, Any]) -> Curve:
    name = a["lr_scheduler"].lower()
    decay, period, gamma, said = name, 0.0, a["lr_gamma"], f"--lr-scheduler {name}"
    if name == "steplr":
        decay, period = "step", float(a["lr_step_size"])
        said += f" --lr-step-size {a['lr_step_size']} --lr-gamma {shown(gamma)}"
    elif name == "exponentiallr":
        decay, period = "step", 1.0
        said += f" --lr-gamma {shown(gamma)}"
    elif name == "cosineannealinglr":
        decay = "cosine"
        said += f" --lr-min {shown(a['lr_min'])}"
    else:
        raise InputError(
            f"--lr-scheduler {a['lr_scheduler']} is none of steplr, cosineannealinglr, "
            f"exponentiallr, which the script has."
            f"{nearest_word(name, ('steplr', 'cosineannealinglr', 'exponentiallr'))}"
        )
    method = a["lr_warmup_method"]
    if method not in ("linear", "constant"):
        raise InputError(
            f"--lr-warmup-method {method} is neither linear nor constant, which the script has."
        )
    return Curve(
        said=f"{said} --epochs {a['epochs']}",
        said_warmup=f"--lr-warmup-epochs {a['lr_warmup_epochs']} --lr-warmup-method {method} "
        f"--lr-warmup-decay {shown(a['lr_warmup_decay'])}",
        epochs=float(a["epochs"]),
        warmup_epochs=float(a["lr_warmup_epochs"]),
        warmup="gradual" if method == "linear" else "constant",
        start=a["lr_warmup_decay"],
        start_is_share=True,
        decay=decay,
        period=period,
        gamma=gamma,
        final_lr=a["lr_min"] if decay == "cosine" else 0.0,
    )


def _average(a: dict[str, Any], batch: Batch, gaps: list[Gap]) -> Average | None:
    if not a["model_ema"]:
        return None
    steps, epochs = a["model_ema_steps"], a["epochs"]
    adjust = batch.gpus * batch.per_gpu * steps / epochs
    alpha = min(1.0, (1.0 - a["model_ema_decay"]) * adjust)
    gaps.append(
        Gap(
            "the average's start and its rhythm",
            f"torchvision copies the weights until the warmup's end (epoch "
            f"{a['lr_warmup_epochs']}) and moves the average every {steps} iterations",
            f"the same decay over {steps} updates, moved at each; the average of the first epochs "
            "holds initial weights",
        )
    )
    return Average(
        said=f"--model-ema --model-ema-decay {a['model_ema_decay']:g} --model-ema-steps {steps}",
        decay=1.0 - alpha,
        every=steps,
        formula=f"alpha = (1 - {a['model_ema_decay']:g}) x {batch.gpus} GPUs x {batch.per_gpu} x "
        f"{steps} / {epochs} epochs = {alpha:.6g}, at most 1, every {steps} iterations",
    )


def _rows(a: dict[str, Any]) -> list[Translation]:
    rows = [_optimizer(a["opt"].lower())]
    if rows[0].value in ("momentum", "sgd", "rmsprop"):
        rows.append(
            Translation(f"--momentum {shown(a['momentum'])}", "momentum", a["momentum"], "alike")
        )
    said = f"--weight-decay {shown(a['weight_decay'])}"
    rows.append(
        Translation(said, "weight_decay", a["weight_decay"], "L2 in the gradient, or AdamW's own")
    )
    norm = a["norm_weight_decay"]
    alike = norm is None or norm == a["weight_decay"]
    rows.append(
        Translation(
            "no --norm-weight-decay" if norm is None else f"--norm-weight-decay {shown(norm)}",
            "decay_all",
            alike,
            "norms and biases decay like all else" if alike else "norms do not decay",
        )
    )
    for flag, setting in (
        ("label-smoothing", "label_smoothing"),
        ("mixup-alpha", "mixup"),
        ("cutmix-alpha", "cutmix"),
        ("clip-grad-norm", "clip_grad_norm"),
        ("random-erase", "random_erasing"),
    ):
        value = a[flag.replace("-", "_")]
        if value:
            rows.append(Translation(f"--{flag} {shown(value)}", setting, value, "the same number"))
    size = a["train_crop_size"]
    rows.append(Translation(f"--train-crop-size {size}", "img_size", size, "pixels a side"))
    crop, resize = a["val_crop_size"], a["val_resize_size"]
    rows.append(
        Translation(
            f"--val-crop-size {crop} --val-resize-size {resize}",
            "crop_pct",
            float(f"{crop / resize:.6g}"),
            f"share kept = crop / resize = {crop} / {resize}",
        )
    )
    if a["interpolation"] in ("bilinear", "bicubic"):
        value = a["interpolation"]
        why = "of training and evaluation"
        rows.append(Translation(f"--interpolation {value}", "interpolation", value, why))
    why = "ImageNet's, fixed in torchvision's presets"
    rows.append(Translation("preset", "mean", [0.485, 0.456, 0.406], why))
    rows.append(Translation("preset", "std", [0.229, 0.224, 0.225], why))
    amp = a["amp"]
    said, why = ("--amp", "autocast and GradScaler") if amp else ("no --amp", "no autocast")
    rows.append(Translation(said, "precision", "fp16" if amp else "fp32", why))
    if a["auto_augment"] == "imagenet":
        why = "AutoAugment's ImageNet policy, in timm's words"
        rows.append(Translation("--auto-augment imagenet", "auto_augment", "original", why))
    if a["weights"] or a["pretrained"]:
        said = f"--weights {a['weights']}" if a["weights"] else "--pretrained"
        rows.append(Translation(said, "pretrained", True, "pretrained weights, timm's"))
    if a["data_path"]:
        why = "sub-folders a class, under train/ and val/"
        rows.append(
            Translation(f"--data-path {a['data_path']}", "data", f"folder:{a['data_path']}", why)
        )
        why = "ImageFolder leaves photographs as they are stored"
        rows.append(Translation("ImageFolder", "exif_orientation", False, why))
    return rows


def _optimizer(name: str) -> Translation:
    said = f"--opt {name}"
    if name.startswith("sgd"):
        if "nesterov" in name:
            return Translation(
                said, "optimizer", "sgd", "SGD with Nesterov's momentum is timm's sgd"
            )
        return Translation(said, "optimizer", "momentum", "SGD without Nesterov: timm's sgd has it")
    if name == "rmsprop":
        return Translation(said, "optimizer", "rmsprop", "torch's RMSprop, alpha 0.9 on both sides")
    if name == "adamw":
        return Translation(said, "optimizer", "adamw", "torch's AdamW, betas 0.9 and 0.999")
    raise InputError(
        f"--opt {name} is none of sgd, sgd_nesterov, rmsprop, adamw, which the script has."
        f"{nearest_word(name, ('sgd', 'sgd_nesterov', 'rmsprop', 'adamw'))}"
    )
