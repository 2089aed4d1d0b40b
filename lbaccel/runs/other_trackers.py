"""Accelerate's other trackers beside the run folder and wandb: tensorboard, mlflow, trackio, ..."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from lbaccel.errors import InputError
from lbaccel.runs.folder import plain

OURS = ("run_folder", "wandb")
_PACKAGES = {"comet_ml": "comet-ml"}  # where pip's name is another one


def tracker_names() -> tuple[str, ...]:
    """All that `log_with` takes with this version of accelerate."""
    return (*OURS, *(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) not in OURS))


def check_tracker(name: str, *, where: str) -> None:
    """Stop at a tracker that there is not, or that is not installed.

    Args:
        name: of the tracker.
        where: it was given, as it is typed.

    Raises:
        InputError: with the nearest name, or the line that installs it.
    """
    if name in OURS:
        return
    if name not in tracker_names():
        near = difflib.get_close_matches(name, tracker_names(), n=1)
        raise InputError(
            f"{where} {name} is not one of {', '.join(tracker_names())}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    if name not in {str(getattr(t, "value", t)) for t in get_available_trackers()}:
        raise InputError(
            f"{where} {name} needs a package that is not here: "
            f"pip install {_PACKAGES.get(name, name)}"
        )


def make_tracker(name: str, *, run: Path, project: str) -> GeneralTracker:
    """The tracker of accelerate, which keeps its files, where it has any, in the run folder."""
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind(run.name, logging_dir=str(run / name))
    return kind(project)


def store_settings(tracker: GeneralTracker, config: Mapping[str, Any]) -> None:
    """Hand on the settings as every tracker takes them: numbers, truth values and text."""
    kept = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in plain(config).items()
    }
    tracker.store_init_configuration(kept)
