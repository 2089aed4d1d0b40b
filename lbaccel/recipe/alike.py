"""The settings and software that the ranks of the recipe must have in common, compared first."""

from __future__ import annotations

from typing import Any

from lbaccel.errors import InputError
from lbaccel.launch import asks_for_ranks
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.checks import Checked, checked
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.runs.alike import check_alike, software
from lbaccel.runs.ranks import on_each_rank

# of each machine: its paths, its memory; which images lie at the path is compared when it is open
_OWN = (
    *("data", "output", "memory", "workers", "resume", "batch_decisions", "checkpoint"),
    *("teacher", "cache_images"),
)


def check_started_alike(accelerator: Any, settings: Settings) -> None:
    """Stop on every rank where their settings, their code or its versions differ; a collective.

    Raises:
        InputError: what differs, and on which ranks; or another rank's own error.
    """
    if accelerator.num_processes == 1:
        return
    on_each_rank(accelerator, lambda: None)  # a rank that has no settings comes to `tell` instead
    compared = (row for row in OPTIONS.values() if row.name not in _OWN)
    facts = {row.flag: settings.value(row.name) for row in compared}
    facts["--resume"] = settings.run.resume is not None
    facts["--teacher"] = settings.data.teacher is not None
    facts["extensions of the run"] = settings.extensions
    facts["data that the run began with"] = settings.identity
    check_alike(accelerator, {**facts, **software()})


def checked_on_each_rank(settings: Settings) -> Checked:
    """As `checked`; an error of one rank ends all.

    Raises:
        InputError: settings that can't be used.
    """
    try:
        return checked(settings)
    except InputError as error:
        tell(error)
        raise


def tell(error: Exception) -> None:
    """Let the other ranks hear of this rank's error before it has an Accelerator; they all end."""
    if not asks_for_ranks():
        return

    def fail() -> None:
        raise error

    accelerator, _ = make_accelerator(None)
    on_each_rank(accelerator, fail)
