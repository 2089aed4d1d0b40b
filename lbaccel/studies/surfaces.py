"""The landscapes that a study draws around what its runs found, once they have ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lbaccel.runs.folder import CHECKPOINTS, LAST
from lbaccel.studies.folder import LANDSCAPES, run_folder, state_of
from lbaccel.studies.spec import Study, Surface

Say = Callable[[str], object]


def draw_landscapes(folder: Path, study: Study, *, say: Say) -> None:
    """Compute what is not there yet, of each place's first seed; point by point, so it goes on.

    The weights are those after the last update, not of the best evaluation. A place whose run
    diverged has no landscape.

    Raises:
        InputError, RunFailed: as `loss_landscape`.
    """
    from lbaccel.landscape.landscape import loss_landscape

    for surface in study.landscapes:
        run = run_folder(folder, study.cell(surface.place, study.seeds[0]))
        if run is None or state_of(run) != "done":
            say(f"landscape {surface.name}: its run has not come to its end")
            continue
        say(f"landscape {surface.name}")
        loss_landscape(
            run / CHECKPOINTS / LAST,
            x=surface.x,
            y=surface.y or None,
            samples=surface.samples or None,
            output=landscape_folder(folder, surface),
            say=lambda text, name=surface.name: say(f"  {name}: {text}"),
        )


def check_surface(surface: Surface) -> None:
    """Stop at axes that no landscape has, before anything runs.

    Raises:
        InputError: as `axis_of` and `check_grid`.
    """
    from lbaccel.landscape.axes import axis_of, check_grid

    check_grid(axis_of(surface.x), axis_of(surface.y) if surface.y else None)


def landscape_folder(folder: Path, surface: Surface) -> Path:
    """Where the files of a landscape of a study lie."""
    return folder / LANDSCAPES / surface.name


def pictures(folder: Path, study: Study) -> list[tuple[Surface, Path]]:
    """Each picture of a landscape that is there."""
    return [
        (surface, path)
        for surface in study.landscapes
        for path in sorted(landscape_folder(folder, surface).glob("*.png"))
    ]
