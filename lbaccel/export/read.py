"""Reads and checks a run folder and one of its checkpoints: the source of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lbaccel.errors import InputError
from lbaccel.export.model_card import Exported
from lbaccel.models import model_options
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import BEFORE, parse
from lbaccel.runs.folder import CONFIG, ENVIRONMENT, METRICS, RESUMES, SUMMARY
from lbaccel.runs.kinds import MACHINE, RESUMED, SETTINGS, SUMMED, check_kinds
from lbaccel.runs.read import Run, flatten, history_of, read_mapping, read_metrics
from lbaccel.runs.saved_weights import (
    arguments_of,
    checkpoint_of,
    deepspeed_text,
    dtype_of,
    is_deepspeeds,
    read_checkpoint,
)


def read_exported(
    run: Path, *, checkpoint: str | None = None, ema: bool = False
) -> tuple[Exported, dict[str, Tensor]]:
    """The run in this folder and the weights of one of its checkpoints, by default the best.

    Raises:
        InputError: no run, no such checkpoint, a damaged one, or no average in it.
    """
    if not (run / CONFIG).is_file():
        raise InputError(_no_run(run))
    found = read_checkpoint(checkpoint_of(run, checkpoint, ema=ema), ema=ema)
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
        )
        | arguments_of(pre),
    )
    return exported, weights


def _run(folder: Path) -> Run:
    """As `load_run_folder`, but settings are parsed, and metrics need not be there."""
    raw = read_mapping(folder / CONFIG)
    where = str(folder / CONFIG)
    raw = {**BEFORE, **raw}  # of a run of before, the values that it had without a name for them
    settings = {key: parse(OPTIONS[key], raw[key], where) for key in raw if key in OPTIONS}
    added = {key: raw[key] for key in ("plan", "extensions") if key in raw}
    whole = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    of_one_level = {key: value for key, value in settings.items() if key not in whole}
    config, summary = flatten({**of_one_level, **added}) | whole, read_mapping(folder / SUMMARY)
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
    if is_deepspeeds(path):
        return deepspeed_text(path)
    runs = sorted(path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    hint = f"Give one of the {len(runs)} in it, such as {runs[-1].parent}." if runs else (
        "Give the folder that lbaccel train printed."
    )  # fmt: skip
    return f"{path} is no run folder: it holds no {CONFIG}. {hint}"
