"""Which of a run's settings make its experiment: they decide the result, or how long it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import ASKED, BEFORE, CHANGES, EXTENSIONS, IDENTITY, ORIGIN, PLAN
from lbaccel.recipe.values import shown
from lbaccel.runs.folder import plain
from lbaccel.runs.read import Run

# from the rest of the plan, or from the contract
_FOLLOWS = {
    f"{PLAN}/{name}"
    for name in (
        *("equation", "gradient_accumulation_steps", "num_updates", "lr"),
        "predicted_peak_gib",
    )
}
# the fingerprint follows from the seed, where a share of the images is held out
_IMAGES = (f"{IDENTITY}/num_train", f"{IDENTITY}/num_val")


def with_experiment(runs: Sequence[Run], *, plan: bool = False) -> list[Run]:
    """The runs with the settings that a comparison is about.

    Args:
        runs: with all that their config.yaml, or wandb, says.
        plan: keep also how an update fits the machine, which does not decide the result.
    """
    settings = experiment_settings([one.config for one in runs], plan=plan)
    return [
        replace(one, config=kept, summary={**one.summary, **_status(one)})
        for one, kept in zip(runs, settings, strict=True)
    ]


def _status(one: Run) -> dict[str, str]:
    """Of a run of the recipe that wrote no end: it was killed, or goes on."""
    status = one.summary.get("status")
    if one.source == "wandb-cloud" or not _of_the_recipe(one.config):
        return {}
    return {"status": "unfinished"} if status in (None, "running") else {}


def experiment_settings(
    configs: Sequence[Mapping[str, Any]], *, plan: bool = False
) -> list[dict[str, Any]]:
    """Of each flat config the settings of the experiment, by the option table.

    An entry that the table does not know is a setting: a loop of your own may have any. A setting
    that a run of the recipe does not name, since it is older, has the value that it had then. A
    value of the plan that repeats a setting in every run is left out.

    >>> experiment_settings([{"seed": 0, "workers": 2, "output": "runs", "origin/seed": "flag"}])
    [{'seed': 0}]
    """
    whole = [_completed(as_typed(joined(one))) for one in configs]

    def counts(key: str) -> bool:
        group, _, name = key.partition("/")
        if group == PLAN:
            repeats = all(one.get(key) == one.get(name, ...) for one in whole if key in one)
            return plan and key not in _FOLLOWS and not repeats
        if group == IDENTITY:
            return key in _IMAGES and all(key in one for one in whole)
        if group in (EXTENSIONS, CHANGES):
            return any(one.get(group) for one in whole)
        if group in OPTIONS:
            row = OPTIONS[group]
            return row.contract or row.length or (plan and row.plan)
        return group not in (ORIGIN, ASKED)

    return [{key: value for key, value in one.items() if counts(key)} for one in whole]


def joined(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config in which a setting that is a mapping is one entry again.

    >>> joined({"model_kwargs/stem": 8, "model_kwargs/act": "gelu", "origin/seed": "flag"})
    {'model_kwargs': {'stem': 8, 'act': 'gelu'}, 'origin/seed': 'flag'}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name, *inner = key.split("/")
        if inner and name in OPTIONS:
            place = found.setdefault(name, {})
            for part in inner[:-1]:
                place = place.setdefault(part, {})
            place[inner[-1]] = value
        else:
            found[key] = value
    return found


def as_typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with text in place of mappings."""
    return {k: shown(v) if isinstance(v, Mapping) else v for k, v in config.items()}


def _of_the_recipe(config: Mapping[str, Any]) -> bool:
    return any(key.startswith(f"{PLAN}/") for key in config)


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    if not _of_the_recipe(config):
        return dict(config)
    added = {
        name: plain(BEFORE.get(name, row.default))
        for name, row in OPTIONS.items()
        if name not in config and (row.contract or row.length)
    }
    return {EXTENSIONS: [], CHANGES: [], **added, **config}


def beside_defaults(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that are not at the table's default, as they are typed: they have to be said.

    >>> beside_defaults({"model": "resnet50", "mixup": 0.0, "epochs": 8.0})
    {'model': 'resnet50', 'epochs': '8'}
    """
    return {
        name: shown(value) or "none"
        for name, value in settings.items()
        if name not in OPTIONS or value != plain(OPTIONS[name].default)
    }
