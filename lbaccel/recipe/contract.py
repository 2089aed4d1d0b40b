"""The contract inside a checkpoint: `config.yaml` is for people, and is compared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, reading
from lbaccel.optim.scaling import is_measured
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import (
    ASKED,
    CHANGES,
    EXTENSIONS,
    IDENTITY,
    ORIGIN,
    TEACHER,
    options_in,
    parse,
)
from lbaccel.recipe.values import flag_of, nearest_word, shown
from lbaccel.runs.folder import CHECKPOINTS, CONTRACT, MANIFEST, checkpoints_in, plain

VALUES = "settings"
# The other settings of a contract have a part in a checkpoint's own state (weights, optimizer and
# its groups, place in the data), which a resume takes as it was saved.
CHANGEABLE = frozenset(
    {
        *("data", "mean", "std", "interpolation", "crop_pct", "auto_augment"),
        *("scale", "ratio", "hflip", "color_jitter", "random_erasing", "crop_padding_mode"),
        *("label_smoothing", "mixup", "cutmix", "drop_rate", "drop_path", "clip_grad_norm"),
        *("loss", "teacher", "distill_alpha", "distill_temperature"),
        *("norm_batch_size", "bn_statistics", "bn_momentum"),
        *("warmup", "warmup_epochs", "warmup_start"),
        *("schedule", "milestones", "gamma", "final_lr"),
    }
)


def contract_of(settings: Settings, taken: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the result of a run, for its checkpoints.

    Args:
        settings: of the run.
        taken: the settings as the run takes them, as config.yaml says them.
    """
    measured = settings.batch.follows_noise or is_measured(settings.rate.lr_scaling)
    names = [name for name, row in OPTIONS.items() if row.contract or name == "epochs"]
    names += ["micro_batch_size", "noise_scale"] if measured else []
    origins = {name: settings.origin(name) for name in OPTIONS}
    kept = (ASKED, EXTENSIONS, IDENTITY, CHANGES, *((TEACHER,) if TEACHER in taken else ()))
    history = {key: taken[key] for key in kept}
    return plain({VALUES: {n: taken[n] for n in names}, ORIGIN: origins, **history})


def read_contract(checkpoint: Path) -> dict[str, Any] | None:
    """The contract that made a checkpoint; None of an earlier version, which kept none.

    Raises:
        InputError: it is damaged, or the manifest is.
    """
    try:
        with reading(checkpoint / MANIFEST):
            manifest = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        expected = json.loads(manifest)["files"].get(CONTRACT)
        if expected is None:
            return None
        path = checkpoint / CONTRACT
        with reading(path):
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise InputError(f"{path} is damaged: its checksum is not the manifest's.")
        found = json.loads(content)
        for key in (VALUES, ORIGIN, ASKED):
            dict(found[key])
        return found
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{checkpoint} holds no contract that can be read: {error}.") from error


def contract_for(target: Path, run: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that a resume will take, as far as its contract says, and that contract."""
    for path in [target] if target != run else checkpoints_in(run / CHECKPOINTS):
        try:
            return path, read_contract(path)
        except InputError:  # refused by its name when checkpoints are compared with their sums
            continue
    return None, None


def names_allowed(words: Collection[str]) -> frozenset[str]:
    """The names behind `--allow-changed`.

    Raises:
        InputError: no such option, one that any resume may change, or one that none can.
    """
    names = {word.strip("-").replace("-", "_") for word in words}
    for name in sorted(names):
        if name not in OPTIONS:
            raise InputError(
                f"--allow-changed {name}: there is no such setting.{nearest_word(name, OPTIONS)}"
            )
        if name == "epochs":
            raise InputError("--allow-changed epochs: use --epochs with --extend.")
        if not OPTIONS[name].contract:
            raise InputError(
                f"--allow-changed {name}: it is no part of the contract. Give "
                f"{flag_of(name)} alone."
            )
        if name not in CHANGEABLE:
            raise InputError(
                f"--allow-changed {name}: the state in a checkpoint goes with its {name}, so no "
                "resume can change it. Start a new run from the weights with --checkpoint. "
                f"A resume can change {', '.join(sorted(CHANGEABLE))}."
            )
    return frozenset(names)


def against(
    contract: Mapping[str, Any], content: Mapping[Any, Any], path: Path, *, allowed: Collection[str]
) -> dict[Any, Any]:
    """The content of a run's config.yaml, with the contract of its checkpoint in place.

    A line that is missing is the contract's. Origins, what was typed and the images' identity are
    the contract's, whatever the file says.

    Raises:
        InputError: the names of all settings that differ and are not allowed to.
    """
    lines = options_in(content, path)
    extended = _goes_on(contract, content)
    merged, told = {**lines}, {}
    for name, raw in contract[VALUES].items():
        if name not in OPTIONS:
            continue  # of a later version
        before = parse(OPTIONS[name], raw, CONTRACT)
        if name not in lines:
            merged[name] = raw
            continue
        after = parse(OPTIONS[name], lines[name], str(path))
        elsewhere = (name == "data" and same_kind(before, after)) or is_moved(name, before, after)
        if after == before or name in allowed or elsewhere or (name == "epochs" and extended):
            continue
        told[name] = f"{name}: {shown(after)} in place of {shown(before)}"
    if told:
        names = sorted(told.keys() & CHANGEABLE)
        way = f", or take it with --allow-changed {' '.join(names)}" if names else ""
        raise InputError(
            f"{path} differs from the contract that the checkpoint was made with: "
            f"{'; '.join(told.values())}. Restore it{way}, or start a new run without --resume."
        )
    merged |= {key: contract[key] for key in (ORIGIN, ASKED, IDENTITY, CHANGES)}
    return {**merged, EXTENSIONS: content[EXTENSIONS] if extended else contract[EXTENSIONS]}


def changes_of(
    before: Settings, after: Settings, *, allowed: Collection[str], update: int | None
) -> tuple[dict[str, Any], ...]:
    """The changes that a resume makes in the contract, for the record."""
    return tuple(
        {"name": n, "before": before.value(n), "after": after.value(n), "update": update}
        for n in sorted(allowed)
        if n in ("data", "teacher") or before.value(n) != after.value(n)
    )


def check_chosen(checkpoint: Path, contract: Mapping[str, Any] | None) -> None:
    """Stop where the checkpoint that was found good has another contract than was compared.

    Raises:
        InputError: it has; it names the checkpoint to type.
    """
    if read_contract(checkpoint) != contract:
        raise InputError(
            f"{checkpoint} is the newest good checkpoint, and the contract of the run was changed "
            f"after it. Use --resume {checkpoint} to have the two compared."
        )


def same_kind(one: str, other: str) -> bool:
    """Whether two sources are both folders, or both parquet files."""
    (kind, colon, _), (other_kind, _, _) = one.partition(":"), other.partition(":")
    return bool(colon) and kind == other_kind


def is_moved(name: str, before: Any, after: Any) -> bool:
    """Whether a setting names another place of a teacher, whose weights are compared by digest."""
    return name == "teacher" and None not in (before, after)


def _goes_on(contract: Mapping[str, Any], content: Mapping[Any, Any]) -> bool:
    """Whether the file's history of lengths goes on from the contract's, as --extend writes it."""
    before, after = contract[EXTENSIONS], content.get(EXTENSIONS)
    if not isinstance(after, list) or after[: len(before)] != before or len(after) == len(before):
        return False
    first = after[len(before)]
    return isinstance(first, list) and first[:1] == [contract[VALUES]["epochs"]]
