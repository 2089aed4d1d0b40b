"""Checkpoints and metrics past the update that a resume goes on from: put aside, never deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lbaccel.runs.folder import (
    ABANDONED,
    ABANDONED_METRICS,
    BEST,
    BEST_EMA,
    CHECKPOINTS,
    DECISIONS,
    LAST,
    MANIFEST,
    METRICS,
    REPLACED,
    WRITING,
    checkpoint_name,
    linked_name,
    point_link,
    update_of,
)
from lbaccel.runs.metric_lines import read_lines


def put_aside(
    run: Path,
    update: int,
    *,
    best: int | None,
    best_ema: int | None = None,
    say: Callable[[str], object],
) -> Path | None:
    """Make `run` end at `update`: what lies behind it moves aside, and `say` hears where to.

    Later checkpoints, whole or damaged, move to `checkpoints/abandoned-N/`, with the links `best`
    and `best-ema` where they name one of them. `last` names the checkpoint of `update`, `best` and
    `best-ema` those of the best updates so far, where they are still there. Later lines of
    `metrics.jsonl` are copied to `metrics_abandoned.jsonl`; `keep_updates_until` takes them out of
    the file itself.

    Args:
        run: a run folder.
        update: which the run goes on from.
        best: the update of the best evaluation up to there.
        best_ema: the same of the averaged weights.
        say: prints a line.

    Returns:
        The folder that checkpoints moved to, or None where none had to.

    Raises:
        OSError: the disk is not writable; nothing is deleted then either.
    """
    folder = run / CHECKPOINTS
    _copy_lines(run, update, say=say)
    later = {p: p.name for p in folder.iterdir() if (update_of(p) or 0) > update}
    later |= _interrupted(folder)
    aside = None
    if later:
        aside = _new_folder(folder)
        for name in (BEST, BEST_EMA):
            _move_link(folder, aside, name, moved={path.name for path in later})
        if (run / DECISIONS).exists():  # the run writes its own again
            shutil.copy2(run / DECISIONS, aside)
        for path, name in sorted(later.items()):
            path.rename(aside / name)
        names = ", ".join(sorted(later.values()))
        say(
            f"resume: moved {names} to {aside}: the run goes on from update {update}. "
            "Delete that folder when you need it no more."
        )
    for name, kept in ((LAST, update), (BEST, best), (BEST_EMA, best_ema)):
        if kept is not None and (folder / checkpoint_name(kept)).is_dir():
            point_link(folder / name, checkpoint_name(kept))
    for path in folder.glob(f"{WRITING}*"):  # a part of a checkpoint, of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    return aside


def _interrupted(folder: Path) -> dict[Path, str]:
    """Whole checkpoints that a kill left beside the one that was to replace them, and names."""
    found: dict[Path, str] = {}
    for path in folder.glob(f"{REPLACED}*"):
        try:
            update = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["update"]
            name = checkpoint_name(update)
        except (OSError, ValueError, KeyError, TypeError):
            name = path.name[1:]
        taken = (folder / name).exists() or name in found.values()
        found[path] = path.name[1:] if taken else name
    return found


def _new_folder(folder: Path) -> Path:
    for number in range(1, 10**6):
        aside = folder / f"{ABANDONED}{number}"
        try:
            aside.mkdir()
        except FileExistsError:
            continue
        return aside
    raise AssertionError("a million resumes")


def _move_link(folder: Path, aside: Path, name: str, *, moved: set[str]) -> None:
    link = folder / name
    target = linked_name(link)
    if target in moved:
        point_link(aside / name, target)
        link.unlink()


def _copy_lines(run: Path, update: int, *, say: Callable[[str], object]) -> None:
    path, to = run / METRICS, run / ABANDONED_METRICS
    if not path.exists():
        return
    later = [
        line
        for line in read_lines(path)
        if line.raw and (line.row is None or line.row["update"] > update)
    ]
    if not later:
        return
    with to.open("ab") as file:
        file.write(b"".join(line.raw + b"\n" for line in later))
    say(f"resume: {len(later)} lines of {METRICS} after update {update} moved to {to}")
