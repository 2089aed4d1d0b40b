"""Checkpoints of a run: written beside and renamed, with checksums, so that a fault costs none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbaccel.errors import InputError, RunFailed
from lbaccel.runs.folder import (
    BEST,
    CLASSES,
    LAST,
    MANIFEST,
    MODEL,
    PREPROCESSING,
    STATE,
    checkpoint_name,
    update_of,
    weights_file,
)


def save_checkpoint(
    folder: Path,
    *,
    update: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    best: bool = False,
    keep: int = 2,
) -> Path:
    """Write `folder/update_<update>`, then turn the links `last` (and `best`) to it.

    Everything is written to a temporary folder beside, with a manifest of checksums, flushed to
    the disk, and renamed when it is whole. The newest `keep` stay, and the one that `best` names.

    Args:
        weights: file stem to state_dict, such as {"model": ..., "model_ema": ...}.
        classes: names, in order of the outputs.
        preprocessing: what evaluation needs: sizes, mean, std, interpolation, stem.
        state: what a resume needs besides, tensors and plain values; see `read_state`.

    Raises:
        RunFailed: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / checkpoint_name(update)
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        for stem, tensors in weights.items():
            plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            safetensors.torch.save_file(plain, temporary / weights_file(stem))
        _write_json(temporary / CLASSES, list(classes))
        _write_json(temporary / PREPROCESSING, dict(preprocessing))
        if state is not None:
            torch.save(dict(state), temporary / STATE)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        _write_json(temporary / MANIFEST, {"update": update, "files": files})
        temporary.chmod(0o755)
        _flush(temporary)
        if target.exists():  # of a run that was resumed from before it
            target.rename(aside := Path(tempfile.mkdtemp(prefix=".writing-", dir=folder)))
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(target)
        for name in (LAST, *([BEST] if best else [])):
            _link(folder / name, target.name)
    except (OSError, safetensors.SafetensorError) as error:
        before = folder / LAST
        kept = f"{before.resolve()} is kept" if before.exists() else "there was none before"
        raise RunFailed(
            f"the checkpoint of update {update} could not be saved in {folder}: {error}. "
            f"The previous checkpoint: {kept}. Free some space, or give another --output."
        ) from error
    finally:  # after an interrupt too
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep)
    return target


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; what was not written to its end is none."""
    if not folder.is_dir():
        return []
    found = {path: update for path in folder.iterdir() if (update := update_of(path)) is not None}
    return sorted(found, key=lambda path: -found[path])


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
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        chosen = files if names is None else {name: files[name] for name in names}
        for name, expected in chosen.items():
            if not (path / name).is_file():
                raise InputError(f"{path / name} is missing.")
            found = _fingerprint(path / name)
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
    """The newest checkpoint whose checksums hold; says which ones it refused, and why."""
    for path in checkpoints_in(folder):
        try:
            check_checkpoint(path)
        except InputError as error:
            say(f"resume: refused {path.name}: {error}")
            continue
        return path
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a checked checkpoint, read with `weights_only=True`."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def remove_unfinished(folder: Path) -> None:
    """Take away what a killed process was writing."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _flush(folder: Path) -> None:
    """Bring the files and the folder to the disk: a rename must not overtake them."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _link(link: Path, target: str) -> None:
    """Turn a symbolic link to `target` in one step."""
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _prune(folder: Path, keep: int) -> None:
    linked = {(folder / name).resolve().name for name in (LAST, BEST)}
    for path in checkpoints_in(folder)[max(1, keep) :]:
        if path.name not in linked:
            shutil.rmtree(path, ignore_errors=True)
