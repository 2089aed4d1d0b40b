"""Going on with a run: which one, with which settings, and from which checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.errors import CannotRead, InputError
from lbaccel.optim.scaling import is_measured
from lbaccel.recipe.contract import (
    against,
    changes_of,
    contract_for,
    is_moved,
    names_allowed,
    same_kind,
)
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import (
    ASKED,
    BEFORE,
    CHANGES,
    EXTENSIONS,
    IDENTITY,
    ORIGIN,
    options_in,
    parse,
    read_file,
)
from lbaccel.recipe.values import flag_of, shown
from lbaccel.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    CONTRACT,
    MANIFEST,
    follow_link,
    run_of,
    update_of,
)
from lbaccel.runs.own_name import own_runs

AUTO = "auto"


def resolve(settings: Settings) -> Settings:
    """The settings of the run that `resume` names, with what was typed now on top.

    `resume` becomes the path of a run folder or of a checkpoint, or None where "auto" found none.
    `asked` becomes the settings of the contract that were typed when the run began, and
    `extensions` its history of lengths: pairs (epochs before, how the cosine went on).

    Raises:
        InputError: no such run, a setting typed that decides the result and differs from the
            run's, or `extend` where nothing is extended.
    """
    target, how = settings.run.resume, settings.run.extend
    fresh = replace(settings, asked=_typed_contract(settings))
    allowed = names_allowed(settings.run.allow_changed)
    if target is None:
        if allowed:
            raise InputError("--allow-changed is for a resumed run. Add --resume, or leave it out.")
        if how is not None:
            raise InputError("--extend is for a resumed run with other --epochs. Add --resume.")
        return fresh
    if settings.run.dry_run:
        raise InputError("--dry-run writes nothing and --resume goes on writing. Use one of them.")
    if target == AUTO:
        fresh = replace(fresh, origins={**fresh.origins, "resume": AUTO})
        run = newest_run(Path(settings.run.output), fresh.asked, allowed=allowed)
        if run is None:
            return fresh.with_values({"resume": None})
        target = str(run)
    target = str(follow_link(Path(target)))
    run = run_of(Path(target))
    checkpoint, contract = contract_for(Path(target), run)
    saved = read_run(run, contract=contract, allowed=allowed)
    asked = {name: value for name, value in fresh.asked.items() if name not in allowed}
    _check_contract(run, saved, asked)
    _check_units(run, saved, settings)
    merged = _merged(run, saved, fresh)
    before, after = saved.rate.epochs, merged.rate.epochs
    extensions = saved.extensions
    if after != before:
        _check_extension(how, before=before, after=after)
        extensions = (*extensions, (before, how))
    elif how is not None:
        raise InputError(
            f"--extend {how}: the run already has --epochs {before:g}. Give the new "
            f"length too, such as --epochs {2 * before:g}."
        )
    before = saved if contract is None else saved.with_values(_values(contract))
    update = None if checkpoint is None else update_of(checkpoint)
    changes = changes_of(before, merged, allowed=allowed, update=update)
    typed = {c["name"]: fresh.asked[c["name"]] for c in changes if c["name"] in fresh.asked}
    return replace(
        merged.with_values({"resume": target}),
        asked={**saved.asked, **typed},
        contract=contract,
        changes=(*saved.changes, *changes),
        notes=(*settings.notes, *_notes(checkpoint, contract, changes)),
        given=frozenset(),  # it began with what a new run is refused for
        extensions=extensions,
        identity=None if "data" in allowed else saved.identity,
    )


def _merged(run: Path, saved: Settings, now: Settings) -> Settings:
    """The run's own settings where nobody types another value now."""
    kept = [n for n, row in OPTIONS.items() if row.of_run and now.origin(n) == "default"]
    where = str(run / CONFIG)
    origins = {name: saved.origins.get(name, where) for name in kept}
    return replace(
        now.with_values({name: saved.value(name) for name in kept}),
        origins={**now.origins, **origins},
    )


def _values(contract: Mapping[str, Any]) -> dict[str, Any]:
    return _parsed({n: v for n, v in contract["settings"].items() if n in OPTIONS}, Path(CONTRACT))


def _notes(
    checkpoint: Path | None,
    contract: Mapping[str, Any] | None,
    changes: tuple[Mapping[str, Any], ...],
) -> tuple[str, ...]:
    notes = [
        f"resume: {c['name']} is {shown(c['after'])} from update {c['update']} on, in place of "
        f"{shown(c['before'])}, as --allow-changed says"
        for c in changes
    ]
    if checkpoint is not None and contract is None:
        notes.append(
            f"resume: {checkpoint.name} was written by an earlier lbaccel and holds no contract, "
            f"so {CONFIG} can't be checked against it"
        )
    return tuple(notes)


def newest_run(
    output: Path, asked: Mapping[str, Any], *, allowed: Collection[str] = ()
) -> Path | None:
    """The newest run in `output` that was asked for with the same contract and has a checkpoint.

    Compared are the settings of the contract that were typed, now and then: a rerun of the same
    command finds its run, and no copy of it.
    """
    for folder in own_runs(output):
        if not any((folder / CHECKPOINTS).glob(f"update_*/{MANIFEST}")):
            continue
        try:
            _, contract = contract_for(folder, folder)
            saved = read_run(folder).asked if contract is None else _asked(contract[ASKED], folder)
        except CannotRead:  # it may be the run that is looked for
            raise
        except InputError:
            continue
        left_out = dict.fromkeys(allowed)
        if {**saved, **left_out} == {**asked, **left_out}:
            return folder
    return None


def _asked(layer: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return _parsed({name: value for name, value in layer.items() if name in OPTIONS}, path)


def read_run(
    run: Path, *, contract: Mapping[str, Any] | None = None, allowed: Collection[str] = ()
) -> Settings:
    """Settings of a run, from its config.yaml.

    An option that it does not know has the value that says what was done before there was one:
    `Option.before`, or the default.

    Args:
        run: its folder.
        contract: of the checkpoint that is taken, which the file is compared with.
        allowed: names of settings that may differ from it.

    Raises:
        InputError: the file is damaged, or of a version with other settings.
    """
    path = run / CONFIG
    content = read_file(path)
    if contract is not None:
        content = against(contract, content, path, allowed=allowed)
    saved = _parsed(options_in(content, path), path)
    origins, asked, identity = (content.get(key) for key in (ORIGIN, ASKED, IDENTITY))
    missing = [name for name in ("model", "data", "global_batch_size") if name not in saved]
    if missing or not isinstance(origins, dict) or not isinstance(asked, dict):
        raise InputError(
            f"{path} is not whole: {', '.join([*missing, ORIGIN, ASKED])[:80]} is missing. "
            "Restore it, or start from the weights with --checkpoint."
        )
    try:
        history = tuple((float(before), how) for before, how in content[EXTENSIONS])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its extensions can't be read ({error}).") from error
    changes = content.get(CHANGES)
    return replace(
        Settings().with_values({**BEFORE, **saved}),
        origins={str(name): str(origin) for name, origin in origins.items()},
        asked=_asked(asked, path),
        extensions=history,
        identity=identity if isinstance(identity, dict) else None,  # none before 0.2
        changes=tuple(changes) if isinstance(changes, list) else (),
    )


def _parsed(layer: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {name: parse(OPTIONS[name], raw, str(path)) for name, raw in layer.items()}


def _typed_contract(settings: Settings) -> dict[str, Any]:
    return {
        name: settings.value(name)
        for name, row in OPTIONS.items()
        if row.contract and settings.origin(name) != "default"
    }


def _check_contract(run: Path, saved: Settings, asked: Mapping[str, Any]) -> None:
    """Stop at a setting that differs from what the run was asked for and from what came of it."""
    for name, value in asked.items():
        has = saved.value(name)
        if name == "data" and saved.identity is not None and same_kind(value, has):
            continue  # the images are the contract, wherever they lie: `check_identity`
        if is_moved(name, has, value):
            continue  # `read_teacher` compares the weights
        if value not in (has, saved.asked.get(name, has)):
            flag = flag_of(name)
            typed, has = (shown(v) if isinstance(v, Mapping) else v for v in (value, has))
            raise InputError(
                f"{flag} {typed}: the run in {run} has {has}, and this setting decides its "
                f"result, so a resume can't change it. Leave {flag} out, or start a new run "
                "without --resume."
            )


def _check_units(run: Path, saved: Settings, now: Settings) -> None:
    """Stop at another micro-batch where batch or rate follow what micro-batches measure.

    Raises:
        InputError: it is typed, and differs.
    """
    follows = {
        f"--lr-scaling {saved.rate.lr_scaling}": is_measured(saved.rate.lr_scaling),
        "--global-batch-size auto": saved.batch.follows_noise
        and saved.batch.batch_decisions is None,
    }
    name = next((flag for flag, holds in follows.items() if holds), None)
    size, asked = saved.batch.micro_batch_size, now.batch.micro_batch_size
    if name is None or now.origin("micro_batch_size") == "default" or asked == size:
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
