"""The folder of a study's results: its study, its runs, and how far each of them is (no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lbaccel.documents import Malformed, OutOfBounds, json_in
from lbaccel.errors import InputError, brief
from lbaccel.runs.folder import CONFIG, SUMMARY, atomic_write_text, plain, strict_json
from lbaccel.runs.lock import is_held
from lbaccel.runs.read import flatten
from lbaccel.studies.anchoring import anchored
from lbaccel.studies.read import as_mapping, read_study
from lbaccel.studies.spec import Study, StudyCell

STUDY, CELLS, TUNING, LANDSCAPES = "study.yaml", "cells", "tuning", "landscapes"
CHOSEN, SHARED = "tuning.json", "cells.json"
SETTINGS, LOG, CLAIM = "settings.yaml", "log.txt", ".claim.lock"  # of a cell

ENDED = ("done", "diverged")  # states of a run that has its result
State = Literal["done", "diverged", "failed", "running", "stopped", "missing"]


def study_in(folder: Path) -> Study:
    """The study whose results a folder holds.

    Raises:
        InputError: the folder is no study's.
    """
    if not (folder / STUDY).is_file():
        raise InputError(
            f"{folder} holds no {STUDY}, so it is no folder of a study's results. "
            "Begin one: lbaccel study run NAME --output DIR."
        )
    return read_study(folder / STUDY)


def is_study(folder: Path) -> bool:
    """Whether a folder is one of a study's results."""
    return (folder / STUDY).is_file()


def begin(folder: Path, study: Study) -> Study:
    """Make the folder of a study, or go on in one of the same; gives the study that it holds now.

    More seeds than before are taken over, and another target; fewer seeds leave those that are
    there. Relative paths become absolute.

    Raises:
        InputError: the folder holds another study's results, or something else.
    """
    study = anchored(study)
    if not is_study(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"--output {folder} is not empty and holds no study. Use another folder."
            )
        _make(folder)
        rewrite(folder, study)
        return study
    held = there = study_in(folder)
    if study.target is not None:  # it changes no run
        there = replace(held, target=study.target)
    before, now = flatten(as_mapping(there)), flatten(as_mapping(study))
    differing = [k for k in {**before, **now} if k != "seeds" and before.get(k) != now.get(k)]
    if differing:
        key = differing[0]
        raise InputError(
            f"--output {folder} holds the results of another study: there {key} is "
            f"{brief(before.get(key))}, here {brief(now.get(key))}. Use another folder, or go on "
            f"with that one: lbaccel study run {folder}"
        )
    more = [seed for seed in study.seeds if seed not in there.seeds]
    grown = replace(there, seeds=(*there.seeds, *more))
    if grown != held:
        rewrite(folder, grown)
    return grown


def _make(folder: Path) -> None:
    try:
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {folder} can't hold the study: {error.strerror}. Use another folder."
        ) from error


def rewrite(folder: Path, study: Study) -> None:
    """Write the study that a folder holds."""
    text = yaml.safe_dump(plain(as_mapping(study)), sort_keys=False, allow_unicode=True)
    atomic_write_text(folder / STUDY, text)


def cell_folder(folder: Path, cell: StudyCell) -> Path:
    """Where the runs of a cell lie."""
    return folder / (TUNING if cell.variant else CELLS) / cell.name


def run_folder(folder: Path, cell: StudyCell) -> Path | None:
    """The run of a cell: the newest that came to its end, else the newest; None before it began."""
    home = folder / CELLS / shared_names(folder).get(cell.name, cell.name)
    if cell.variant:
        home = cell_folder(folder, cell)
    if not home.is_dir():
        return None
    runs = sorted((path for path in home.iterdir() if (path / CONFIG).is_file()), reverse=True)
    ended = [path for path in runs if state_of(path) in ENDED]
    return next(iter((*ended, *runs)), None)


def without_result(folder: Path, cells: Sequence[StudyCell]) -> list[StudyCell]:
    """The cells whose run has no result yet."""
    return [cell for cell in cells if state_of(run_folder(folder, cell)) not in ENDED]


def shared_names(folder: Path) -> Mapping[str, str]:
    """Of each cell whose settings another one has too, the name of the folder with its run."""
    found = _json_at(folder / SHARED)
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def share(folder: Path, cells: Mapping[str, str]) -> None:
    """Write which cell's folder each cell has its run in."""
    atomic_write_text(folder / SHARED, json.dumps(dict(cells), indent=1) + "\n")


def chosen_in(folder: Path) -> list[dict[str, Any]]:
    """The choices of the grid: a mapping for each arm and batch size; damaged ones are left out."""
    found = _json_at(folder / CHOSEN)
    return [one for one in found if _is_choice(one)] if isinstance(found, list) else []


def _is_choice(one: Any) -> bool:
    if not isinstance(one, dict):
        return False
    values, results = one.get("values"), one.get("results")
    if not isinstance(values, list) or not isinstance(results, list) or None in values:
        return False
    kinds = {"arm": str, "batch": int, "setting": str}
    return all(isinstance(one.get(name), kind) for name, kind in kinds.items()) and all(
        n is None or isinstance(n, (int, float)) for n in (*values, *results, one.get("best"))
    )


def choose(folder: Path, found: list[dict[str, Any]]) -> None:
    """Write what was tuned."""
    atomic_write_text(folder / CHOSEN, strict_json(found, indent=1) + "\n")


def state_of(run: Path | None) -> State:
    """How far a run is.

    `diverged`: its loss was not finite, which is a result. `failed`: it ended in another error.
    `stopped`: it can go on. `running`: a process writes into it.
    """
    if run is None:
        return "missing"
    summary = _json_at(run / SUMMARY)
    summary = summary if isinstance(summary, dict) else {}
    status = summary.get("status")
    if status == "done":
        return "done"
    if status == "failed":
        return "diverged" if summary.get("diverged") is True else "failed"
    return "running" if is_held(run) else "stopped"


def _json_at(path: Path) -> Any:
    try:
        return json_in(path) if path.is_file() else None
    except (Malformed, OutOfBounds):
        return None
