"""Runs and studies by their paths, as the parts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.report.of_runs import of_runs
from lbaccel.report.of_study import of_study
from lbaccel.report.page import Part
from lbaccel.report.pictures import PictureRoom
from lbaccel.runs.folder import METRICS
from lbaccel.runs.read import Run, load_run

STUDY = "study.yaml"  # a folder with such a file holds the results of a study


def parts_of(
    paths: Sequence[str | Path], *, metric: str = "val/top1", target: float | None = None
) -> list[Part]:
    """A part a study, and one for all runs.

    Raises:
        InputError: a path that is neither a run nor a study, a run that can't be read, or runs of
            which none has logged the metric.
    """
    room = PictureRoom()
    parts: list[Part] = []
    runs: list[tuple[Run, Path | None]] = []
    for path in map(Path, paths):
        if (path / STUDY).is_file():
            parts.append(of_study(_study_result(path), path, number=len(parts) + 1, room=room))
        else:
            runs.append(_run(path))
    if runs:
        for one, _ in runs:
            one.warn()
        parts.append(of_runs(runs, metric=metric, target=target, room=room))
    return parts


def _study_result(path: Path) -> dict[str, Any]:
    return import_module("lbaccel.studies.results").study_result(path)


def _run(path: Path) -> tuple[Run, Path | None]:
    try:
        one = load_run(path)
    except InputError as error:
        if (path / METRICS).is_file() or path.suffix == ".wandb":
            raise
        raise InputError(f"{error} The results folder of a study holds {STUDY}.") from error
    return one, path if one.source == "folder" else None
