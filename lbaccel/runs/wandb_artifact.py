"""A checkpoint as an artifact of wandb: what one needs to use the model, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbaccel.runs.folder import (
    CLASSES,
    MANIFEST,
    MODEL,
    MODEL_EMA,
    PREPROCESSING,
    weights_file,
)
from lbaccel.runs.wandb_tracker import WandB

FILES = (weights_file(MODEL), weights_file(MODEL_EMA), CLASSES, PREPROCESSING, MANIFEST)
MOST_CLASSES = 1000  # in the metadata; the file of classes has them all


def log_checkpoint(
    accelerator: Any, checkpoint: Path, *, name: str, which: str, known: Mapping[str, Any]
) -> str | None:
    """Log the weights, classes and preprocessing of a checkpoint as wandb's artifact `name`.

    It holds no optimizer state, and `lbaccel eval` and `predict` read it as they read a checkpoint.
    Offline, its files lie in the folder of this start of the run, from where `wandb sync` uploads
    them: a later resume may delete the checkpoint itself.

    Args:
        accelerator: with its trackers; only those of the main process do anything.
        checkpoint: its folder, or a link to it.
        name: of the run; wandb numbers the versions of an artifact.
        which: "best" or "last", the artifact's alias beside wandb's `latest`.
        known: update, epoch and metrics, for the metadata.

    Returns:
        A line for the user; None where no tracker is wandb.
    """
    tracker = next((one for one in accelerator.trackers if isinstance(one, WandB)), None)
    if tracker is None:
        return None
    import wandb

    classes = json.loads((checkpoint / CLASSES).read_text(encoding="utf-8"))
    described = {**known, "num_classes": len(classes)}
    if len(classes) <= MOST_CLASSES:
        described["classes"] = classes
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:128]
    artifact = wandb.Artifact(clean, type="model", metadata=described)
    files = [checkpoint.resolve() / file for file in FILES]
    files = [file for file in files if file.is_file()]
    if tracker.run.offline:
        files = _beside(Path(tracker.run.dir).parent / f"artifact-{which}", files)
    for file in files:
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    tracker.run.log_artifact(artifact, aliases=["latest", which])
    return f"wandb: artifact {clean}:{which} holds the checkpoint of update {known['update']}"


def _beside(folder: Path, files: list[Path]) -> list[Path]:
    """The files in another folder, as hard links where the file system has them: no second copy."""
    folder.mkdir(exist_ok=True)
    placed = []
    for file in files:
        target = folder / file.name
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
        placed.append(target)
    return placed
