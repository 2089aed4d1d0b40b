"""Reads and checks a run folder and one of its checkpoints: the source of an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError
from lbaccel.export.kinds import (
    MACHINE,
    NAMES,
    RESUMED,
    SETTINGS,
    SUMMED,
    WHOLE,
    check_kinds,
    check_preprocessing,
)
from lbaccel.export.model_card import Exported
from lbaccel.models import model_options, read_tensors
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import parse
from lbaccel.runs.checkpoints import check_files
from lbaccel.runs.folder import (
    BEST,
    CHECKPOINTS,
    CLASSES,
    CONFIG,
    ENVIRONMENT,
    LAST,
    MANIFEST,
    METRICS,
    MODEL,
    MODEL_EMA,
    PREPROCESSING,
    RESUMES,
    SUMMARY,
    follow_link,
    weights_file,
)
from lbaccel.runs.read import Run, flatten, history_of, read_mapping, read_metrics


def read_exported(
    run: Path, *, checkpoint: str | None = None, ema: bool = False
) -> tuple[Exported, dict[str, Tensor]]:
    """The run in this folder and the weights of one of its checkpoints, by default the best.

    Raises:
        InputError: no run, no such checkpoint, a damaged one, or no average in it.
    """
    if not (run / CONFIG).is_file():
        raise InputError(_no_run(run))
    found = read_checkpoint(checkpoint_of(run, checkpoint), ema=ema)
    pre, weights = found.preprocessing, found.weights
    resumes = run / RESUMES
    lines = read_metrics(resumes) if resumes.is_file() else []
    for line in lines:
        check_kinds(resumes, line, RESUMED)
    env = read_mapping(run / ENVIRONMENT)
    check_kinds(run / ENVIRONMENT, env, MACHINE)
    exported = Exported(
        run=_run(run),
        env=env,
        resumes=lines,
        preprocessing=pre,
        classes=found.classes,
        update=found.update,
        ema=ema,
        dtype=str(dtype_of(weights)).removeprefix("torch."),
        options=model_options(
            pre["model"],
            num_classes=pre["num_classes"],
            num_channels=pre["num_channels"],
            img_size=pre["img_size"],
        ),
    )
    return exported, weights


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


def _run(folder: Path) -> Run:
    """As `load_run_folder`, but settings are parsed, and metrics need not be there."""
    raw = read_mapping(folder / CONFIG)
    where = str(folder / CONFIG)
    settings = {key: parse(OPTIONS[key], raw[key], where) for key in raw if key in OPTIONS}
    added = {key: raw[key] for key in ("plan", "extensions") if key in raw}
    config, summary = flatten({**settings, **added}), read_mapping(folder / SUMMARY)
    check_kinds(folder / CONFIG, config, SETTINGS)
    check_kinds(folder / SUMMARY, summary, SUMMED)
    metrics = folder / METRICS
    return Run(
        name=folder.resolve().name,
        config=config,
        summary=summary,
        history=history_of(read_metrics(metrics)) if metrics.is_file() else {},
        source="folder",
    )


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"{path}: there is no such folder. Give the one that lbaccel train printed."
    if (path.parent.parent / CONFIG).is_file():
        return (
            f"{path} lies in a run folder. Give the run, and the checkpoint by its name: "
            f"lbaccel export {path.parent.parent} --checkpoint {path.name}"
        )
    if _is_deepspeeds(path):
        return _deepspeed(path)
    runs = sorted(path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    hint = f"Give one of the {len(runs)} in it, such as {runs[-1].parent}." if runs else (
        "Give the folder that lbaccel train printed."
    )  # fmt: skip
    return f"{path} is no run folder: it holds no {CONFIG}. {hint}"


def checkpoint_of(run: Path, name: str | None = None) -> Path:
    """The folder of the run's checkpoint of this name; None is the best, or else the last.

    Raises:
        InputError: there is none.
    """
    folder = run / CHECKPOINTS
    there = sorted(path.name for path in folder.glob("[!.]*") if follow_link(path).is_dir())
    if name not in (None, BEST, LAST) and not re.fullmatch(r"update_\d+", name):
        raise InputError(
            f"--checkpoint {name} is not best, last or one such as update_000500. "
            f"Here are: {', '.join(there) or 'none'}."
        )
    for chosen in [name] if name is not None else [BEST, LAST]:
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
    if not (path / MANIFEST).is_file() and _is_deepspeeds(path):
        raise InputError(_deepspeed(path))
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


def _is_deepspeeds(path: Path) -> bool:
    return any(next(path.glob(f"{sub}*_model_states.pt"), None) for sub in ("", "*/"))


def _deepspeed(path: Path) -> str:
    return (
        f"{path} holds DeepSpeed's own files, in parts for its ranks. Join them first: "
        f"python {path}/zero_to_fp32.py {path} OUT --safe_serialization, and load "
        "OUT/model.safetensors with timm.create_model(..., checkpoint_path=...)."
    )
