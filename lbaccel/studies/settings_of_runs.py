"""Which settings of a study's runs differ between its arms, and which are equal (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.recipe.experiment import as_typed, experiment_settings
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import layered, under_a_batch_schedule
from lbaccel.recipe.values import shown
from lbaccel.runs.folder import plain
from lbaccel.studies.folder import STUDY
from lbaccel.studies.one_run import CellRun
from lbaccel.studies.spec import BATCH, Study

_OWN = (BATCH, "seed")  # which the study varies itself
_ABSENT = "not stated"


def settings_of_runs(
    study: Study, runs: Sequence[CellRun]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Of each arm the settings in which arms differ; and those that are equal in all runs.

    They are the settings of the experiment as the runs took them. A place of which no run was begun
    has those that the study states, and the defaults of those that other places state. A setting
    that follows the batch size is a text, such as "0.1 at 256, 0.2 at 512".
    """
    read = [one for one in runs if one.run is not None]
    found = experiment_settings([one.run.config for one in read if one.run is not None])
    by_place: dict[tuple[str, int], Mapping[str, Any]] = {}
    for one, settings in zip(read, found, strict=True):
        by_place.setdefault((one.cell.arm, one.cell.batch), settings)
    stated = list(dict.fromkeys(name for one in runs for name in one.cell.settings))
    for one in runs:
        if (one.cell.arm, one.cell.batch) not in by_place:
            whole = _with_defaults(one.cell.settings, stated)
            by_place[one.cell.arm, one.cell.batch] = as_typed(plain(whole))
    names = [n for n in dict.fromkeys(n for of in by_place.values() for n in of) if n not in _OWN]
    arms: dict[str, dict[str, Any]] = {arm.name: {} for arm in study.arms}
    equal: dict[str, Any] = {}
    for name in names:
        of_arms = {
            arm: {b: of[name] for (a, b), of in by_place.items() if a == arm and name in of}
            for arm in arms
        }
        if _same(of_arms):
            equal[name] = _by_batch({b: v for of in of_arms.values() for b, v in of.items()})
        else:
            for arm, values in of_arms.items():
                arms[arm][name] = _by_batch(values) if values else _ABSENT
    return arms, equal


def _with_defaults(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings with the values that these others have in a run that does not state them."""
    whole = under_a_batch_schedule(layered(Settings(), settings, origin=STUDY))
    return dict(settings) | {
        name: whole.value(name) for name in names if name not in settings and name in OPTIONS
    }


def _same(of_arms: Mapping[str, Mapping[int, Any]]) -> bool:
    """Whether arms have the same value wherever they share a batch size, or one value at all."""
    values: dict[int, Any] = {}
    for of in of_arms.values():
        if any(values.setdefault(batch, value) != value for batch, value in of.items()):
            return False
    one = {shown(value) for value in values.values()}
    # arms without a batch size in common can't be told apart by what follows the batch
    shared = len({frozenset(of) for of in of_arms.values() if of}) == 1
    return len(one) == 1 or shared


def _by_batch(values: Mapping[int, Any]) -> Any:
    """One value, or a text with the value at each batch size."""
    first = next(iter(values.values()))
    if all(value == first for value in values.values()):
        return first
    return ", ".join(f"{shown(value)} at {batch:,}" for batch, value in sorted(values.items()))
