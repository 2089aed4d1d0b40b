"""Checkpoints of a run: written beside and renamed, with checksums, so that a fault costs none."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbaccel.errors import CannotRead, InputError, RunFailed, reading, way_out
from lbaccel.models import read_torch
from lbaccel.runs.folder import (
    BEST,
    BEST_EMA,
    CLASSES,
    CONTRACT,
    LAST,
    MANIFEST,
    MODEL,
    PREPROCESSING,
    STATE,
    checkpoint_name,
    checkpoints_in,
    follow_link,
    point_link,
    weights_file,
    written_beside,
)


def save_checkpoint(
    folder: Path,
    *,
    update: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    contract: Mapping[str, Any] | None = None,
    best: bool = False,
    best_ema: bool = False,
    keep: int = 2,
) -> Path:
    """Write `folder/update_<update>`, then turn the link `last` to it.

    Everything is written to a folder beside, with a manifest of checksums, and renamed when it is
    whole (`written_beside`). The newest `keep` stay, and those that `best` and `best-ema` name.

    Args:
        weights: file stem to state_dict, such as {"model": ..., "model_ema": ...}.
        classes: names, in order of the outputs.
        preprocessing: what evaluation needs: sizes, mean, std, interpolation, stem.
        state: what a resume needs besides, tensors and plain values; see `read_state`.
        contract: what decided the weights, as plain values.
        best, best_ema: turn the link of that name too: the weights, or their average, have never
            been better.
        keep: the newest checkpoints that stay, besides those that have a link.

    Raises:
        RunFailed: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / checkpoint_name(update)
    try:
        with written_beside(target) as beside:
            for stem, tensors in weights.items():
                plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                safetensors.torch.save_file(plain, beside / weights_file(stem))
            _write_json(beside / CLASSES, list(classes))
            _write_json(beside / PREPROCESSING, dict(preprocessing))
            if state is not None:
                torch.save(dict(state), beside / STATE)
            if contract is not None:
                _write_json(beside / CONTRACT, dict(contract))
            files = {path.name: fingerprint(path) for path in sorted(beside.iterdir())}
            _write_json(beside / MANIFEST, {"update": update, "files": files})
        links = (LAST, *[BEST] * best, *[BEST_EMA] * best_ema)
        for name in links:
            point_link(folder / name, target.name)
    except (OSError, safetensors.SafetensorError) as error:
        before = folder / LAST
        kept = (
            f"{follow_link(before).resolve()} is kept"
            if before.exists()
            else "there was none before"
        )
        raise RunFailed(
            f"the checkpoint of update {update} could not be saved in {folder}: {error}. "
            f"The previous checkpoint: {kept}. {way_out(error, 'give another --output')}"
        ) from error
    _prune(folder, keep)
    return target


def check_checkpoint(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        InputError: a file that is missing, cut off or changed, by its name; no training state.
    """
    if STATE not in check_files(path):
        raise InputError(
            f"{path} holds weights only, no training state. Start a run from them with "
            f"--checkpoint {path / weights_file(MODEL)}."
        )


def check_files(path: Path, *, names: Collection[str] | None = None) -> tuple[str, ...]:
    """Compare these files with the manifest, by default all; the names of all that it lists.

    Raises:
        InputError: a file that is missing, cut off or changed, by its name.
        CannotRead: a file that the system refuses to read.
    """
    with reading(path):
        return _compare(path, names)


def _compare(path: Path, names: Collection[str] | None) -> tuple[str, ...]:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        chosen = files if names is None else {name: files[name] for name in names}
        for name, expected in chosen.items():
            if not (path / name).is_file():
                raise InputError(f"{path / name} is missing.")
            found = fingerprint(path / name)
            if found["bytes"] != expected["bytes"]:
                raise InputError(
                    f"{path / name} holds {found['bytes']:,} bytes in place of "
                    f"{expected['bytes']:,}: it is cut off."
                )
            if found["sha256"] != expected["sha256"]:
                raise InputError(f"{path / name} is damaged: its checksum is not the manifest's.")
    except FileNotFoundError:
        raise InputError(f"{path} has no {MANIFEST}: it was not written to its end.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / MANIFEST} is damaged: {error}.") from error
    return tuple(files)


def latest_good(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The newest checkpoint whose checksums hold; says which ones it refused, and why.

    Raises:
        CannotRead: one that may be good: a run that goes on from an older one leaves it behind.
    """
    for path in checkpoints_in(folder):
        try:
            check_checkpoint(path)
        except CannotRead:
            raise
        except InputError as error:
            say(f"resume: refused {path.name}: {error}")
            continue
        return path
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a checked checkpoint, read with `weights_only=True`.

    Raises:
        InputError: a file that torch can't read so, or that holds no parts by name.
    """
    state = read_torch(path / STATE)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path / STATE} holds no training state: it was not written by lbaccel.")
    return state


def fingerprint(path: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _prune(folder: Path, keep: int) -> None:
    linked = {follow_link(folder / name).resolve().name for name in (LAST, BEST, BEST_EMA)}
    for path in checkpoints_in(folder)[max(1, keep) :]:
        if path.name not in linked:
            shutil.rmtree(path, ignore_errors=True)
