"""`--wandb-artifacts`: a run's best or last checkpoint for wandb, once, when the run has ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lbaccel.errors import InputError
from lbaccel.recipe.options_training import RunOptions
from lbaccel.runs.folder import CHECKPOINTS, MANIFEST, follow_link
from lbaccel.runs.wandb_login import wandb_mode

if TYPE_CHECKING:
    from lbaccel.recipe.training import Training

NONE = "none"
_ENDS = ("done", "stopped")  # who interrupts a run does not wait for an upload


def check_artifacts(run: RunOptions) -> None:
    """Stop where an artifact is asked for and wandb writes nothing.

    Raises:
        InputError: with who disabled it.
    """
    if run.wandb_artifacts == NONE or "wandb" not in run.log_with:
        return
    mode, origin = wandb_mode(run.wandb_mode)
    if mode == "disabled":
        by = "--wandb-mode disabled" if origin == "requested" else "WANDB_MODE=disabled"
        raise InputError(
            f"--wandb-artifacts {run.wandb_artifacts}: {by} logs nothing, so there would be no "
            "artifact. Use --wandb-mode offline."
        )


def log_artifact(t: Training, status: str) -> None:
    """Log the checkpoint that the settings ask for, where the run is done or its time is over.

    Where that fails, a note says so: the run folder has the checkpoint.
    """
    from lbaccel.runs.wandb_artifact import log_checkpoint

    which, folder = t.settings.run.wandb_artifacts, t.session.folder
    if which == NONE or folder is None or status not in _ENDS or not t.accelerator.is_main_process:
        return
    checkpoint = follow_link(folder / CHECKPOINTS / which)
    try:
        update = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["update"]
        known = {"model": t.settings.model.model, **t.log.known_at(update, t.large_batch)}
        line = log_checkpoint(t.accelerator, checkpoint, name=folder.name, which=which, known=known)
    except Exception as error:  # of the disk, of the network, or of wandb
        line = (
            f"note: {checkpoint} was not logged as wandb's artifact ({type(error).__name__}: "
            f"{error}). The run is whole without it."
        )
    if line:
        t.accelerator.print(line)
