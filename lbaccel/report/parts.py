"""Runs and studies by their paths, as one page below its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.report.curves import POINTS
from lbaccel.report.of_runs import of_runs
from lbaccel.report.of_study import of_study
from lbaccel.report.page import MOST_BYTES, Part, page
from lbaccel.report.pictures import MOST_BYTES as PICTURES
from lbaccel.report.pictures import PictureRoom
from lbaccel.runs.folder import METRICS
from lbaccel.runs.read import Run, load_run
from lbaccel.studies.folder import STUDY, is_study
from lbaccel.studies.results import study_result

_SMALLER = (1, 2, 4, 8)  # how many times fewer points and bytes of pictures are tried


@dataclass
class Reported:
    """The subject of a page, read once.

    Attributes:
        studies: result and folder of each.
        runs: each with its folder, where it has one.
    """

    studies: list[tuple[dict[str, Any], Path]] = field(default_factory=list)
    runs: list[tuple[Run, Path | None]] = field(default_factory=list)


def read(paths: Sequence[str | Path]) -> Reported:
    """The runs and studies at these paths; damaged lines of runs are warnings.

    Raises:
        InputError: a path that is neither a run nor a study, or a run that can't be read.
    """
    found = Reported()
    for path in map(Path, paths):
        if is_study(path):
            found.studies.append((study_result(path), path))
        else:
            found.runs.append(_run(path))
    for one, _ in found.runs:
        one.warn()
    return found


def parts_of(
    found: Reported, *, metric: str = "val/top1", target: float | None = None, smaller: int = 1
) -> list[Part]:
    """A part a study, and one for all runs.

    Args:
        found: what the page is about.
        metric, target: of the runs.
        smaller: how many times fewer points and bytes of pictures than the most.

    Raises:
        InputError: no run has logged the metric.
    """
    room = PictureRoom(PICTURES // smaller)
    points = POINTS // smaller // (len(found.studies) + bool(found.runs))
    parts = [
        of_study(result, path, number=number, room=room, points=points)
        for number, (result, path) in enumerate(found.studies, 1)
    ]
    if found.runs:
        parts.append(of_runs(found.runs, metric=metric, target=target, room=room, points=points))
    return parts


def report(
    paths: Sequence[str | Path], *, metric: str = "val/top1", target: float | None = None
) -> tuple[str, list[Part]]:
    """The page on these runs and studies, below 2 MB, and its parts.

    Raises:
        InputError: see `read` and `parts_of`; or they are too many for one page.

    >>> text, parts = report(["runs/20261128-220927-test_resnet-gbs96"])  # doctest: +SKIP
    >>> parts[0].content["verdict"][0]  # doctest: +SKIP
    'The run reaches 99.16 % val/top1 (1 seed).'
    """
    found, size = read(paths), 0
    for smaller in _SMALLER:
        parts = parts_of(found, metric=metric, target=target, smaller=smaller)
        text = page(parts)
        size = len(text.encode())
        if size < MOST_BYTES:
            return text, parts
    raise InputError(
        f"these {len(found.runs)} runs and {len(found.studies)} studies make a page of "
        f"{size / 1e6:.1f} MB, and {MOST_BYTES / 1e6:g} MB is the most. Give fewer of them."
    )


def _run(path: Path) -> tuple[Run, Path | None]:
    try:
        one = load_run(path)
    except InputError as error:
        if (path / METRICS).is_file() or path.suffix == ".wandb":
            raise
        raise InputError(f"{error} The results folder of a study holds {STUDY}.") from error
    return one, path if one.source == "folder" else None
