"""The weights in a checkpoint, checked, and the network that takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError
from lbaccel.models import (
    adapt_stem,
    create_backbone,
    load_exactly,
    model_options,
    read_tensors,
)
from lbaccel.network_arguments import network_arguments
from lbaccel.network_build import num_values, try_arguments
from lbaccel.runs.checkpoints import check_files
from lbaccel.runs.folder import (
    BEST,
    BEST_EMA,
    CHECKPOINTS,
    CLASSES,
    LAST,
    MANIFEST,
    MODEL,
    MODEL_EMA,
    PREPROCESSING,
    follow_link,
    weights_file,
)
from lbaccel.runs.kinds import ARGUMENTS, NAMES, WHOLE, check_kinds, check_preprocessing


@dataclass(frozen=True, eq=False)
class SavedWeights:
    """A checkpoint, checked: its weights, and how images are made ready for them.

    Args:
        path: its folder.
        file: the one of the weights, in that folder.
        update: that the weights were saved after.
        preprocessing: model, outputs, channels, size, mean, std, stem.
        classes: names, in order of the outputs.
        weights: tensor to its name.
    """

    path: Path
    file: Path
    update: int
    preprocessing: dict[str, Any]
    classes: list[str]
    weights: dict[str, Tensor]


def read_checkpoint(path: Path, *, ema: bool = False) -> SavedWeights:
    """The checkpoint in this folder; its files are compared with its manifest first.

    Raises:
        InputError: a damaged one, or no average in it.
    """
    stem = MODEL_EMA if ema else MODEL
    update = _check(path, stem)
    pre = _json(path / PREPROCESSING, dict)
    weights = read_tensors(path / weights_file(stem))
    check_preprocessing(path / PREPROCESSING, pre, weights)
    classes = _json(path / CLASSES, list)
    check_kinds(path / CLASSES, {"names": classes}, {"names": NAMES})
    return SavedWeights(path, path / weights_file(stem), update, pre, classes, weights)


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The type of the first tensor that holds numbers with a point; float32 without one."""
    return next((v.dtype for v in weights.values() if v.is_floating_point()), torch.float32)


def network_of(pre: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network that a checkpoint's `preprocessing.json` names, with these weights, to evaluate.

    Raises:
        InputError: timm here does not know the model, or builds another one.
    """
    sizes = {name: pre[name] for name in ("num_classes", "num_channels", "img_size")}
    arguments, described = arguments_of(pre), None
    if arguments:
        described = try_arguments(pre["model"], arguments, model_options(pre["model"], **sizes))
        if pre["stem"] == "small":
            with torch.device("meta"):
                adapt_stem(described)
        check_described(described, weights, PREPROCESSING)
    model = create_backbone(pre["model"], **sizes, arguments=arguments, described=described)
    if pre["stem"] == "small":
        adapt_stem(model)
    model.to(dtype_of(weights))
    load_exactly(model, weights, pre["model"], None)
    return model.eval()


def arguments_of(pre: Mapping[str, Any]) -> dict[str, Any]:
    """The network's own arguments in a checkpoint's `preprocessing.json`, as it was built with."""
    return network_arguments(pre.get(ARGUMENTS) or {}) or {}


def check_described(model: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Stop at a network of more values than its weights: a text may name one of any size.

    Raises:
        InputError: it has; `name` is the file that describes it.
    """
    described, held = num_values(model), sum(v.numel() for v in weights.values())
    if described > held:
        raise InputError(
            f"{name} describes a network of {described:,} values, and "
            f"{weights_file(MODEL)} holds {held:,}: they are not of one model."
        )


def checkpoint_of(run: Path, name: str | None = None, *, ema: bool = False) -> Path:
    """The folder of the run's checkpoint of this name; None is the best, or else the last.

    Args:
        run: its folder.
        name: of a checkpoint, or of a link to one.
        ema: the best is that of the averaged weights; a run of before has one best alone.

    Raises:
        InputError: there is none.
    """
    folder = run / CHECKPOINTS
    there = sorted(path.name for path in folder.glob("[!.]*") if follow_link(path).is_dir())
    if name not in (None, BEST, BEST_EMA, LAST) and not re.fullmatch(r"update_\d+", name):
        raise InputError(
            f"--checkpoint {name} is not best, best-ema, last or one such as update_000500. "
            f"Here are: {', '.join(there) or 'none'}."
        )
    for chosen in [name] if name is not None else [*[BEST_EMA] * ema, BEST, LAST]:
        if chosen in there:
            return follow_link(folder / chosen)
    if not there:
        raise InputError(
            f"{run} has no checkpoint: the run ended before its first. Go on with it: "
            f"lbaccel train --resume {run}"
        )
    raise InputError(
        f"{folder / (name or BEST)} does not exist. Here are: {', '.join(there)}. "
        f"Use --checkpoint {there[-1]}."
    )


def _check(path: Path, stem: str) -> int:
    """The checkpoint's update, after its files were compared with the manifest."""
    others = "Take another one with --checkpoint."
    if not (path / MANIFEST).is_file() and is_deepspeeds(path):
        raise InputError(deepspeed_text(path))
    try:
        listed = check_files(path, names=())
        files = (weights_file(stem), CLASSES, PREPROCESSING)
        if files[0] in listed:
            check_files(path, names=files)
    except InputError as error:
        raise InputError(f"{error} {others}") from error
    if files[0] not in listed and stem == MODEL_EMA:
        raise InputError(
            f"--ema: {path} has no average of the weights: the run had no --ema-decay. "
            "Leave --ema out."
        )
    if files[0] not in listed:
        raise InputError(f"{path} holds no {files[0]}. {others}")
    update = _json(path / MANIFEST, dict).get("update")
    if not WHOLE[1](update):
        raise InputError(f"{path / MANIFEST} is damaged: its update is no whole number. {others}")
    return update


def _json(path: Path, kind: type) -> Any:
    try:
        content = json_in(path)
    except Malformed as error:
        raise InputError(f"{path} is no JSON ({error}). Take another --checkpoint.") from error
    if not isinstance(content, kind):
        raise InputError(f"{path} holds no {kind.__name__}. Take another --checkpoint.")
    return content


def is_deepspeeds(path: Path) -> bool:
    """Whether a folder holds files of DeepSpeed's own, in parts for its ranks."""
    return any(next(path.glob(f"{sub}*_model_states.pt"), None) for sub in ("", "*/"))


def deepspeed_text(path: Path) -> str:
    """The way from files of DeepSpeed's own to weights that can be read."""
    return (
        f"{path} holds DeepSpeed's own files, in parts for its ranks. Join them first: "
        f"python {path}/zero_to_fp32.py {path} OUT --safe_serialization, and load "
        "OUT/model.safetensors with timm.create_model(..., checkpoint_path=...)."
    )
