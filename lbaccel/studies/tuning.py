"""The grid of a setting, the same for every arm and batch size, on a part of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import RunFailed
from lbaccel.recipe.options import default_of
from lbaccel.runs.compare import lower_is_better
from lbaccel.studies.folder import choose, chosen_in, run_folder, state_of
from lbaccel.studies.outcome import value_in
from lbaccel.studies.running import Worker
from lbaccel.studies.spec import ArmBatch, Study, StudyCell, Tune

HELD_OUT = 0.1  # of the training set, as the runs of a grid have it in place of the test set


def grid_cells(study: Study, tune: Tune, place: ArmBatch) -> list[tuple[float, StudyCell]]:
    """Value to run at a place, each with the first seed and without the test set."""
    own = study.cell(place, study.seeds[0]).settings
    base = own.get(tune.setting, default_of(tune.setting))
    found: list[tuple[float, StudyCell]] = []
    for value in tune.at(base if tune.relative else 1.0):
        more = {tune.setting: value, **held_out(str(own.get("data", default_of("data"))))}
        cell = study.cell(place, study.seeds[0], more=more)
        variant = f"{tune.setting}-{value:.6g}"
        found.append((value, StudyCell(cell.arm, cell.batch, cell.seed, cell.settings, variant)))
    return found


def held_out(data: str) -> Mapping[str, Any]:
    """The settings under which a part of the training set stands for the test set.

    A folder with `val/` and no `test/` is read as its `train/` alone: its `val/` is the test set
    of the study.
    """
    kind, _, path = data.partition(":")
    inside = Path(path)
    more: dict[str, Any] = {"val_fraction": HELD_OUT, "test_split": "test"}
    if kind == "folder" and (inside / "train").is_dir() and not (inside / "test").is_dir():
        more = {"val_fraction": HELD_OUT, "data": f"folder:{inside / 'train'}"}
    return more


def tuned(worker: Worker, study: Study, tune: Tune) -> dict[ArmBatch, float]:
    """Run the grid, and give the best value of each place; writes all that was found.

    Raises:
        InputError: an arm can't run.
        RunFailed: not every run of the grid has ended.
    """
    grids = {place: grid_cells(study, tune, place) for place in study.places()}
    tally = worker.run([cell for grid in grids.values() for _, cell in grid])
    if tally.ended < tally.total:
        missing = [*tally.failed, *tally.elsewhere]
        raise RunFailed(
            f"{tally.total - tally.ended} of {tally.total} runs of the grid have no result yet"
            + (f" ({missing[0]} among them)" if missing else "")
            + f". Go on: lbaccel study run {worker.folder}"
        )
    found = [_entry(worker.folder, study, tune, place, grid) for place, grid in grids.items()]
    choose(worker.folder, found)
    return chosen(worker.folder)


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
