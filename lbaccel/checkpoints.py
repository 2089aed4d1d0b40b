"""Checkpoints of a run: written beside and renamed, so that a full disk costs none."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lbaccel.errors import RunFailed

_FOLDER = re.compile(r"update_\d{6,}")


def save_checkpoint(
    folder: Path,
    *,
    update: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    best: bool = False,
    keep: int = 1,
) -> Path:
    """Write `folder/update_<update>`, then turn the links `last` (and `best`) to it.

    Everything is written to a temporary folder beside and renamed when it is whole. Of the older
    ones the newest `keep` stay, and the one that `best` names.

    Args:
        weights: file stem to state_dict, such as {"model": ..., "model_ema": ...}.
        classes: names, in order of the outputs.
        preprocessing: what evaluation needs: sizes, mean, std, interpolation, stem.

    Raises:
        RunFailed: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"update_{update:06d}"
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
            for stem, tensors in weights.items():
                plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                safetensors.torch.save_file(plain, temporary / f"{stem}.safetensors")
            _write_json(temporary / "classes.json", list(classes))
            _write_json(temporary / "preprocessing.json", dict(preprocessing))
            temporary.chmod(0o755)
            temporary.rename(target)
        for name in ("last", *(["best"] if best else [])):
            _link(folder / name, target.name)
    except (OSError, safetensors.SafetensorError) as error:
        before = folder / "last"
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _link(link: Path, target: str) -> None:
    """Turn a symbolic link to `target` in one step."""
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _prune(folder: Path, keep: int) -> None:
    linked = {(folder / name).resolve().name for name in ("last", "best")}
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.name.removeprefix("update_")))
    for path in found[: max(0, len(found) - max(1, keep))]:
        if path.name not in linked:
            shutil.rmtree(path, ignore_errors=True)
