"""The grid of a setting, the same for every arm and batch size, on a part of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.runs.compare import lower_is_better
from lbaccel.studies.folder import choose, chosen_in, run_folder, state_of, without_result
from lbaccel.studies.outcome import value_in
from lbaccel.studies.own_values import own_value
from lbaccel.studies.spec import ArmBatch, Study, StudyCell, Tune, exact

OF_THE_GRID: Mapping[str, Any] = {"val_fraction": 0.1, "test_split": "unused"}
"""A tenth of the training set stands for the images that the study is judged on."""


def grid_cells(study: Study, tune: Tune, place: ArmBatch) -> list[tuple[float, StudyCell]]:
    """Value to run at a place, each with the first seed and without the test set."""
    own = study.cell(place, study.seeds[0]).settings
    base = own_value(own, tune.setting)
    found: list[tuple[float, StudyCell]] = []
    for value in tune.at(base if tune.relative else 1.0):
        more = {tune.setting: value, **OF_THE_GRID}
        cell = study.cell(place, study.seeds[0], more=more)
        variant = f"{tune.setting}-{exact(value)}"
        found.append((value, StudyCell(cell.arm, cell.batch, cell.seed, cell.settings, variant)))
    return found


def grid_of(study: Study) -> list[StudyCell]:
    """Every run of a study's grid; none where nothing is tuned."""
    if study.tune is None:
        return []
    return [cell for place in study.places() for _, cell in grid_cells(study, study.tune, place)]


def settled(folder: Path, study: Study) -> dict[ArmBatch, float] | None:
    """The values that the grid chose; None before all of its runs have ended.

    Whoever ran them, here or elsewhere, the choice is written by the first that asks after that.
    A place whose runs diverged all has none.
    """
    if study.tune is None:
        return {}
    if not chosen_in(folder):
        if without_result(folder, grid_of(study)):
            return None
        tune = study.tune
        found = [
            _entry(folder, study, tune, place, grid_cells(study, tune, place))
            for place in study.places()
        ]
        choose(folder, found)
    return chosen(folder)


def chosen(folder: Path) -> dict[ArmBatch, float]:
    """The choices of a study's grid, by arm and batch size; empty before it was run."""
    return {
        ArmBatch(str(one["arm"]), int(one["batch"])): float(one["best"])
        for one in chosen_in(folder)
        if one.get("best") is not None
    }


def _entry(
    folder: Path, study: Study, tune: Tune, place: ArmBatch, grid: Sequence[tuple[float, StudyCell]]
) -> dict[str, Any]:
    results: list[float | None] = []
    for _, cell in grid:
        run = run_folder(folder, cell)
        ended = run is not None and state_of(run) == "done"
        results.append(value_in(run, study) if run is not None and ended else None)
    values = [value for value, _ in grid]
    best = best_of(values, results, study.metric)
    return {
        "arm": place.arm,
        "batch": place.batch,
        "setting": tune.setting,
        "values": values,
        "results": results,
        "best": best,
        "at_edge": best in (min(values), max(values)),
    }


def best_of(values: Sequence[float], results: Sequence[float | None], metric: str) -> float | None:
    """The value with the best result; of equal ones the smaller, None where all runs diverged.

    >>> best_of([0.05, 0.1, 0.2], [71.0, 73.5, None], "val/top1")
    0.1
    """
    sign = -1.0 if lower_is_better(metric) else 1.0
    ended = [(sign * r, -v) for v, r in zip(values, results, strict=True) if r is not None]
    return -max(ended)[1] if ended else None
