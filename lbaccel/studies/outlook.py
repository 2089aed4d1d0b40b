"""A study before it is run: how many runs and hours, and whether its seeds can resolve anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lbaccel.batch.phases import phase_updates
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError
from lbaccel.launch import chose_threads
from lbaccel.recipe import growth
from lbaccel.recipe.checks import Checked, checked
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import layered, under_a_batch_schedule
from lbaccel.studies.spec import Study, StudyCell
from lbaccel.studies.surfaces import check_surface
from lbaccel.studies.tuning import grid_of

Say = Callable[[str], object]
_TIMED_SECONDS = 20.0  # of updates, at each of two batch sizes


@dataclass(frozen=True)
class CellLength:
    """How long a run of a study trains.

    Attributes:
        cell: the run.
        num_updates: of the whole run.
        samples: that it sees.
        evaluations: of the test set.
    """

    cell: StudyCell
    num_updates: int
    samples: int
    evaluations: int


@dataclass(frozen=True)
class StudyPace:
    """Seconds of a run: `update` an update, `sample` a sample, `evaluation` an evaluation."""

    update: float
    sample: float
    evaluation: float

    def of(self, length: CellLength) -> float:
        """Seconds of a whole run."""
        return (
            self.update * length.num_updates
            + self.sample * length.samples
            + self.evaluation * length.evaluations
        )


def settings_of(cell: StudyCell) -> Checked:
    """The settings of `lbaccel train` for a run of a study, checked.

    Raises:
        InputError: the arm can't run, and why.
    """
    where = f"arm {cell.arm} at batch {cell.batch}"
    try:
        return checked(under_a_batch_schedule(layered(Settings(), cell.settings, origin=where)))
    except InputError as error:
        raise InputError(f"{where} can't run: {error}") from error


def check_cells(study: Study) -> None:
    """Stop at an arm, or a value of the grid, that no run could have, before anything runs.

    Raises:
        InputError: see `settings_of`.
    """
    places = [study.cell(place, study.seeds[0]) for place in study.places()]
    for cell in (*places, *grid_of(study)):
        settings_of(cell)
    for surface in study.landscapes:
        check_surface(surface)


def check_grid_images(study: Study) -> None:
    """Stop where a grid would be judged on images that the study is judged on; opens the data.

    Raises:
        InputError: the data have neither a test nor a validation set, so that both would hold a
            share of the training images out; or they are not there.
    """
    from lbaccel.recipe.images import open_data

    if study.tune is None:
        return
    settings = settings_of(study.cells()[0])
    if open_data(settings.data, seed=settings.run.seed).held_out:
        raise InputError(
            f"--tune {study.tune}: {settings.data.data} has no test set of its own, so the study "
            "is judged on a share of its images, and the grid would be judged on the same ones. "
            "Put a test/ or val/ beside train/, or leave --tune out."
        )


def lengths(cells: Sequence[StudyCell]) -> list[CellLength]:
    """How long each run trains; the images of each data set are opened once.

    Raises:
        InputError: a data set that is not there.
    """
    from lbaccel.recipe.images import open_data

    sizes: dict[Any, int] = {}
    found = []
    for cell in cells:
        s = settings_of(cell)
        if s.data not in sizes:
            sizes[s.data] = len(open_data(s.data, seed=0).train)
        found.append(_length(cell, s, sizes[s.data]))
    return found


def _length(cell: StudyCell, s: Checked, num_samples: int) -> CellLength:
    phases = growth.phases_of(s.batch, s.rate, num_samples=num_samples, say=lambda _: None)
    epochs, last = s.rate.epochs, s.batch.last_update
    if phases:
        run: dict[str, Any] = {"epochs": epochs, "num_samples": num_samples, "last_update": last}
        updates = sum(phase_updates(phases, **run))
        samples = round(epochs * num_samples)
    else:
        size = min(s.batch.first_size, num_samples)
        stream = UpdateStream(size, num_samples, last)
        updates = stream.num_updates(epochs)
        samples = stream.samples_seen(updates)
    if s.rate.max_updates is not None and s.rate.max_updates < updates:
        samples = round(samples * s.rate.max_updates / updates)
        updates = s.rate.max_updates
    return CellLength(cell, updates, samples, max(1, round(epochs / s.run.eval_every)))


def measured_pace(study: Study, *, jobs: int, say: Say) -> StudyPace:
    """Seconds an update, a sample and an evaluation, timed on this machine at two batch sizes.

    Args:
        study: whose first arm is timed, at its smallest and at its largest batch.
        jobs: runs at one time, which share the processor's threads.
        say: prints a line.

    Raises:
        InputError: the arm can't run.
    """
    from lbaccel.recipe.accelerator import make_accelerator
    from lbaccel.recipe.fitting import clock, timed
    from lbaccel.recipe.images import sound_images

    arm = study.arms[0].name
    places = [place for place in study.places() if place.arm == arm]
    found = []
    for place in dict.fromkeys((places[0], places[-1])):
        s = settings_of(study.cell(place, study.seeds[0]))
        accelerator, _ = make_accelerator(s.batch.precision)
        with _threads(jobs):
            opened = sound_images(s, accelerator, say=lambda _: None, fresh=True)
            timing, _ = timed(s, opened, begun=clock(), most=_TIMED_SECONDS)
        say(
            f"timed: arm {place.arm} at batch {place.batch}: {timing.update:.3g} s an update "
            f"(median of {timing.num_timed}), {timing.evaluation:.3g} s an evaluation"
        )
        found.append((min(s.batch.first_size, len(opened[0].train)), timing))
    return _pace(found)


def _pace(found: Sequence[tuple[int, Any]]) -> StudyPace:
    """The line through two timings: seconds = update + sample x batch; one timing is all samples.

    >>> from types import SimpleNamespace as T
    >>> found = [(64, T(update=0.2, evaluation=1.0)), (256, T(update=0.5, evaluation=3.0))]
    >>> pace = _pace(found)
    >>> round(pace.update, 6), round(pace.sample, 9), pace.evaluation
    (0.1, 0.0015625, 2.0)
    """
    (small, first), (large, last) = found[0], found[-1]
    evaluation = (first.evaluation + last.evaluation) / 2
    if small == large:
        return StudyPace(0.0, first.update / small, evaluation)
    sample = max(0.0, (last.update - first.update) / (large - small))
    update = first.update - sample * small
    if update < 0:  # the noise of the clock: the larger one is the surer
        update, sample = 0.0, last.update / large
    return StudyPace(update, sample, evaluation)


@contextmanager
def _threads(jobs: int) -> Any:
    import torch

    before = torch.get_num_threads()
    if jobs > 1 and not chose_threads():
        torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        with suppress(RuntimeError):
            torch.set_num_threads(before)
