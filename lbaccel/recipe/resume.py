"""Going on with a run: which one, with which settings, and from which checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import parse, read_yaml
from lbaccel.runs.folder import CHECKPOINTS, CONFIG, MANIFEST, run_of

# of the invocation, not of the run
NOT_SAVED = ("resume", "extend", "max_hours", "dry_run", "output")
Settings = dict[str, Any]


def resolve(values: Settings, origins: dict[str, str]) -> tuple[Settings, dict[str, str]]:
    """The settings of the run that `resume` names, with what was typed now on top.

    `resume` becomes the path of a run folder or of a checkpoint, or None where "auto" found none.
    Two keys are added: `asked`, the settings of the contract that were typed when the run began,
    and `extensions`, its history of lengths: pairs (epochs before, how the cosine went on).

    Raises:
        InputError: no such run, a setting typed that decides the result and differs from the
            run's, or `extend` where nothing is extended.
    """
    target = values["resume"]
    fresh = {**values, "asked": _typed_contract(values, origins), "extensions": []}
    if target is None:
        if values["extend"] is not None:
            raise InputError("--extend is for a resumed run with other --epochs. Add --resume.")
        return fresh, origins
    if values["dry_run"]:
        raise InputError("--dry-run writes nothing and --resume goes on writing. Use one of them.")
    if target == "auto":
        origins = {**origins, "resume": "auto"}
        run = newest_run(Path(values["output"]), fresh["asked"])
        if run is None:
            return {**fresh, "resume": None}, origins
        target = str(run)
    run = run_of(Path(target))
    saved, saved_origins = read_run(run)
    extensions = saved["extensions"]
    typed = {name for name, origin in origins.items() if origin != "default"}
    _check_contract(run, saved, fresh["asked"])
    _check_units(run, saved, values, origins)
    merged, merged_origins = dict(values), dict(origins)
    for name in OPTIONS:
        if name not in typed and name not in NOT_SAVED and name in saved:
            merged[name] = saved[name]
            merged_origins[name] = saved_origins.get(name, str(run / CONFIG))
    before, after = saved["epochs"], merged["epochs"]
    if after != before:
        _check_extension(values["extend"], before=before, after=after)
        extensions = [*extensions, (before, values["extend"])]
    elif values["extend"] is not None:
        raise InputError(
            f"--extend {values['extend']}: the run already has --epochs {before:g}. Give the new "
            f"length too, such as --epochs {2 * before:g}."
        )
    added = {"resume": target, "asked": saved["asked"], "extensions": extensions}
    return {**merged, **added}, merged_origins


def newest_run(output: Path, asked: Mapping[str, Any]) -> Path | None:
    """The newest run in `output` that was asked for with the same contract and has a checkpoint.

    Compared are the settings of the contract that were typed, now and then: a rerun of the same
    command finds its run.
    """
    folders = sorted(output.iterdir(), reverse=True) if output.is_dir() else []
    for folder in folders:
        if not (folder / CONFIG).is_file():
            continue
        if not any((folder / CHECKPOINTS).glob(f"update_*/{MANIFEST}")):
            continue
        try:
            saved, _ = read_run(folder)
        except InputError:
            continue
        if saved["asked"] == asked:
            return folder
    return None


def read_run(run: Path) -> tuple[Settings, dict[str, str]]:
    """Settings of a run and their origins, with `asked` and `extensions`, from its config.yaml.

    Raises:
        InputError: the file is damaged, or of a version with other settings.
    """
    path = run / CONFIG
    saved = _parsed(read_yaml(path), path)
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    origins, asked = content.get("origin"), content.get("asked")
    # what a run of an earlier version could not be asked for, it did by default
    missing = [name for name in ("model", "data", "global_batch_size") if name not in saved]
    saved = {**{n: option.default for n, option in OPTIONS.items() if option.contract}, **saved}
    if missing or not isinstance(origins, dict) or not isinstance(asked, dict):
        raise InputError(
            f"{path} is not whole: {', '.join([*missing, 'origin', 'asked'])[:80]} is missing. "
            "Restore it, or start from the weights with --checkpoint."
        )
    try:
        history = [(float(before), how) for before, how in content["extensions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its extensions can't be read ({error}).") from error
    known = {name: value for name, value in asked.items() if name in OPTIONS}
    saved |= {"asked": _parsed(known, path), "extensions": history}
    return saved, {str(k): str(v) for k, v in origins.items()}


def _parsed(layer: Mapping[str, Any], path: Path) -> Settings:
    return {name: parse(OPTIONS[name], raw, str(path)) for name, raw in layer.items()}


def _typed_contract(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: values[name]
        for name, option in OPTIONS.items()
        if option.contract and origins.get(name, "default") != "default"
    }


def _check_contract(run: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Stop at a setting that differs from what the run was asked for and from what came of it."""
    for name, value in asked.items():
        if value not in (saved[name], saved["asked"].get(name, saved[name])):
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} {value}: the run in {run} has {saved[name]}, and this setting decides its "
                f"result, so a resume can't change it. Leave {flag} out, or start a new run "
                "without --resume."
            )


def _check_units(run: Path, saved: Settings, values: Settings, origins: Mapping[str, str]) -> None:
    """Stop at another micro-batch where batch or rate follow what micro-batches measure.

    Raises:
        InputError: it is typed, and differs.
    """
    follows = {
        "--lr-scaling adascale": saved["lr_scaling"] == "adascale",
        "--global-batch-size auto": saved["global_batch_size"] == "auto"
        and saved["batch_decisions"] is None,
    }
    name = next((flag for flag, holds in follows.items() if holds), None)
    size, asked = saved.get("micro_batch_size"), values["micro_batch_size"]
    if name is None or origins["micro_batch_size"] == "default" or asked == size:
        return
    raise InputError(
        f"--micro-batch-size {asked}: the run in {run} has {size}, and under {name} micro-batches "
        "are the units that the noise is measured by, so a resume can't change them. Leave it out."
    )


def _check_extension(how: str | None, *, before: float, after: float) -> None:
    if after < before and how in ("restart", "constant"):
        raise InputError(
            f"--extend {how} with --epochs {after:g}: the run has {before:g}, and a shorter one "
            "can only be a compressed cosine. Use --extend stretch."
        )
