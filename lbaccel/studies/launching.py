"""A study from its grid to its last run: here, as shell lines, or by submitit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.folder import share
from lbaccel.studies.running import TRAIN, Tally, Worker, alike, command_lines
from lbaccel.studies.spec import ArmBatch, Study, StudyCell
from lbaccel.studies.tuning import chosen, grid_cells, tuned

Say = Callable[[str], object]


def run_study(
    folder: Path,
    study: Study,
    *,
    launcher: str = "local",
    jobs: int = 1,
    only: Sequence[str] = (),
    say: Say = print,
    command: Sequence[str] = TRAIN,
) -> int:
    """Run what has no result yet, the grid first; 0 where every run has its result.

    Args:
        folder: of the study, see `folder.begin`.
        study: whose runs they are.
        launcher: local (here), print (a shell line a run), or submitit (jobs of a cluster).
        jobs: runs at one time.
        only: names of runs, and no others.
        say: prints a line.
        command: of a run, before its own arguments.

    Raises:
        InputError: an arm can't run, or no such run.
        RunFailed: a run of the grid failed, so the others have no value.
    """
    grid = [cell for place in study.places() for _, cell in _grid(study, place)]
    best = chosen(folder)
    cells = final_cells(study, best) if best or study.tune is None else []
    if only:
        picked = [cell for cell in (*grid, *cells) if cell.name in only]
        _check_names(only, [cell.name for cell in (*grid, *cells)])
        return _ended(Worker(folder, study, jobs, say, command).run(picked), folder, say)
    if launcher == "print":
        return _print(folder, cells or grid, has_grid=bool(grid) and not cells, say=say)
    if launcher == "submitit":
        from lbaccel.studies.cluster import submit

        return submit(folder, cells or grid, jobs=jobs, say=say)
    worker = Worker(folder, study, jobs, say, command)
    if study.tune is not None and not best:
        say(f"grid: {study.tune} at each arm and batch size, {len(grid)} runs")
        best = tuned(worker, study, study.tune)
        if worker.stopped:
            return 130
        cells = final_cells(study, best)
    tally = worker.run(one_of_each(folder, cells))
    if study.landscapes and tally.ended == tally.total:
        from lbaccel.studies.surfaces import draw_landscapes

        draw_landscapes(folder, study, say=say)
    return _ended(tally, folder, say, stopped=worker.stopped)


def final_cells(study: Study, best: dict[ArmBatch, float]) -> list[StudyCell]:
    """The runs of a study, each with what the grid chose for its arm and batch size."""
    return [
        study.cell(place, seed, more=_chosen(study, best, place))
        for seed in study.seeds
        for place in study.places()
    ]


def _chosen(study: Study, best: dict[ArmBatch, float], place: ArmBatch) -> dict[str, float]:
    return {study.tune.setting: best[place]} if study.tune and place in best else {}


def _grid(study: Study, place: ArmBatch) -> list[tuple[float, StudyCell]]:
    return [] if study.tune is None else grid_cells(study, study.tune, place)


def one_of_each(folder: Path, cells: Sequence[StudyCell]) -> list[StudyCell]:
    """The runs without those whose settings an earlier one has; writes which stands for which."""
    shared = alike(cells)
    share(folder, shared)
    return [cell for cell in cells if cell.name not in shared]


def _check_names(only: Sequence[str], names: Sequence[str]) -> None:
    for name in only:
        if name not in names:
            raise InputError(
                f"--only {brief(name)}: the study has no such run.{nearest_name(name, names)} "
                f"Its {len(names)} runs have names such as {names[0]}."
            )


def _print(folder: Path, cells: Sequence[StudyCell], *, has_grid: bool, say: Say) -> int:
    lines = list(command_lines(folder, one_of_each(folder, cells)))
    for line in lines:
        say(line)
    if has_grid:
        say("# the runs of the grid: when they have ended, print again for the study's own")
    return 0


def _ended(tally: Tally, folder: Path, say: Say, *, stopped: bool = False) -> int:
    if tally.elsewhere:
        say(f"{len(tally.elsewhere)} runs are with other workers, such as {tally.elsewhere[0]}")
    if tally.ended == tally.total:
        say(f"all {tally.total} runs have their result: lbaccel study report {folder}")
        return 0
    for name, reason in tally.failed.items():
        say(f"failed: {name}: {reason}")
    done = f"{tally.ended} of {tally.total} runs have their result"
    say(f"{done}; the others: lbaccel study run {folder}")
    return 130 if stopped else 1
