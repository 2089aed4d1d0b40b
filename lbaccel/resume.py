"""Going on with a run: which one, with which settings, and from which checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError
from lbaccel.options import OPTIONS
from lbaccel.settings import parse, read_yaml

CONFIG = "config.yaml"
# of the invocation, not of the run
NOT_SAVED = ("resume", "extend", "max_hours", "dry_run", "output")
Settings = dict[str, Any]


def resolve(values: Settings, origins: dict[str, str]) -> tuple[Settings, dict[str, str]]:
    """The settings of the run that `resume` names, with what was typed now on top.

    `resume` becomes the path of a run folder or of a checkpoint, or None where "auto" found none;
    `extensions` the run's history of lengths: pairs (epochs before, how the cosine went on).

    Raises:
        InputError: no such run, a setting typed that decides the result and differs from the
            run's, or `extend` where nothing is extended.
    """
    asked = values["resume"]
    if asked is None:
        if values["extend"] is not None:
            raise InputError("--extend is for a resumed run with other --epochs. Add --resume.")
        return {**values, "extensions": []}, origins
    if values["dry_run"]:
        raise InputError("--dry-run writes nothing and --resume goes on writing. Use one of them.")
    if asked == "auto":
        run = newest_run(Path(values["output"]), values, origins)
        if run is None:
            return {**values, "resume": None, "extensions": []}, origins
        target = run
    else:
        target = Path(asked)
        run = run_of(target)
    saved, saved_origins, extensions = read_run(run)
    typed = {name for name, origin in origins.items() if origin != "default"}
    _check_contract(run, saved, values, origins)
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
    return {**merged, "resume": str(target), "extensions": extensions}, merged_origins


def run_of(path: Path) -> Path:
    """The run folder that a path names: itself, or the one a checkpoint lies in.

    Raises:
        InputError: the path is neither.
    """
    for folder in (path, path.parent.parent):
        if (folder / CONFIG).is_file():
            return folder
    what = "is no run folder: it holds no config.yaml" if path.exists() else "does not exist"
    raise InputError(
        f"--resume {path} {what}. Give a folder such as runs/20261121-001312-resnet10t-gbs512, "
        "a checkpoint in it, or 'auto'."
    )


def newest_run(output: Path, values: Mapping[str, Any], origins: Mapping[str, str]) -> Path | None:
    """The newest run in `output` that was asked for with the same contract and has a checkpoint.

    Compared are the settings of the contract that were typed, now and then: a rerun of the same
    command finds its run.
    """
    wanted = _typed_contract(values, origins)
    folders = sorted(output.iterdir(), reverse=True) if output.is_dir() else []
    for folder in folders:
        if not (folder / CONFIG).is_file():
            continue
        if not any((folder / "checkpoints").glob("update_*/manifest.json")):
            continue
        try:
            saved, saved_origins, _ = read_run(folder)
        except InputError:
            continue
        if _typed_contract(saved, saved_origins) == wanted:
            return folder
    return None


def read_run(run: Path) -> tuple[Settings, dict[str, str], list[tuple[float, str | None]]]:
    """Settings, their origins and the extensions of a run, from its config.yaml.

    Raises:
        InputError: the file is damaged, or of a version with other settings.
    """
    path = run / CONFIG
    layer = read_yaml(path)
    saved = {name: parse(OPTIONS[name], raw, str(path)) for name, raw in layer.items()}
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    missing = [name for name, option in OPTIONS.items() if option.contract and name not in saved]
    origins, extensions = content.get("origin"), content.get("extensions") or []
    if missing or not isinstance(origins, dict) or "epochs" not in saved:
        raise InputError(
            f"{path} is not whole: {', '.join(missing) or 'origin'} is missing. Restore it, or "
            "start from the weights with --checkpoint."
        )
    try:
        history = [(float(before), how) for before, how in extensions]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: extensions={extensions!r} can't be read.") from error
    return saved, {str(k): str(v) for k, v in origins.items()}, history


def _typed_contract(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: values[name]
        for name, option in OPTIONS.items()
        if option.contract and origins.get(name, "default") != "default"
    }


def _check_contract(
    run: Path, saved: Mapping[str, Any], values: Mapping[str, Any], origins: Mapping[str, str]
) -> None:
    for name, value in _typed_contract(values, origins).items():
        if value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} {value}: the run in {run} has {saved[name]}, and this setting decides its "
                f"result, so a resume can't change it. Leave {flag} out, or start a new run "
                "without --resume."
            )


def _check_extension(how: str | None, *, before: float, after: float) -> None:
    if after < before and how in ("restart", "constant"):
        raise InputError(
            f"--extend {how} with --epochs {after:g}: the run has {before:g}, and a shorter one "
            "can only be a compressed cosine. Use --extend stretch."
        )
