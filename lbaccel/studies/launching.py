"""A study from its grid to its last run: here, as shell lines, or by submitit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.folder import share, shared_names
from lbaccel.studies.running import TRAIN, Tally, Worker, alike, command_lines
from lbaccel.studies.spec import ArmBatch, Study, StudyCell
from lbaccel.studies.tuning import grid_of, settled

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
    """
    worker = Worker(folder, study, jobs, say, command)
    best = settled(folder, study)
    if only:
        return _these(worker, only, best)
    if launcher != "local":
        return _hand_out(folder, study, best, launcher=launcher, jobs=jobs, say=say)
    if best is None:
        grid = grid_of(study)
        say(f"grid: {study.tune} at each arm and batch size, {len(grid)} runs")
        tally = worker.run(grid)
        best = settled(folder, study)
        if best is None:
            return _ended(tally, folder, say, stopped=worker.stopped)
    tally = worker.run(one_of_each(folder, final_cells(study, best)))
    if study.landscapes and tally.ended == tally.total:
        from lbaccel.studies.surfaces import draw_landscapes

        draw_landscapes(folder, study, say=say)
    return _ended(tally, folder, say, stopped=worker.stopped)


def _these(worker: Worker, only: Sequence[str], best: dict[ArmBatch, float] | None) -> int:
    """Run what was named; a run that stands for several arms may be named by each of them."""
    folder, grid = worker.folder, grid_of(worker.study)
    cells = [] if best is None else final_cells(worker.study, best)
    _check_names(only, [cell.name for cell in (*grid, *cells)])
    own = one_of_each(folder, cells)
    names = {shared_names(folder).get(name, name) for name in only}
    picked = [cell for cell in (*grid, *own) if cell.name in names]
    return _ended(worker.run(picked), folder, worker.say, stopped=worker.stopped)


def _hand_out(
    folder: Path,
    study: Study,
    best: dict[ArmBatch, float] | None,
    *,
    launcher: str,
    jobs: int,
    say: Say,
) -> int:
    """Name the runs to a scheduler: those of the grid, and when all of them ended the others."""
    cells = grid_of(study) if best is None else one_of_each(folder, final_cells(study, best))
    if launcher == "submitit":
        from lbaccel.studies.cluster import submit

        submit(folder, cells, jobs=jobs, say=say)
    else:
        for line in command_lines(folder, cells):
            say(line)
    if best is None:
        say("# these are the runs of the grid: when they have ended, type the same line again")
    elif study.landscapes:
        say(f"# when they have ended, the landscapes: lbaccel study run {folder.absolute()}")
    return 0


def final_cells(study: Study, best: dict[ArmBatch, float]) -> list[StudyCell]:
    """The runs of a study, each with what the grid chose for its arm and batch size."""
    return [
        study.cell(place, seed, more=_chosen(study, best, place))
        for seed in study.seeds
        for place in study.places()
    ]


def _chosen(study: Study, best: dict[ArmBatch, float], place: ArmBatch) -> dict[str, float]:
    return {study.tune.setting: best[place]} if study.tune and place in best else {}


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
