"""The images of a run: opened as its settings say, without those that can't be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lbaccel.data.broken import Broken, Share, broken_images, listed, num_entries, without
from lbaccel.data.sources import Source, open_source
from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.recipe.options import Settings
from lbaccel.recipe.options_data import DataOptions
from lbaccel.runs.folder import SKIPPED, atomic_write_text, run_of
from lbaccel.runs.ranks import decided, on_each_rank
from lbaccel.text import printable

Say = Callable[[str], object]
Opened = tuple[Source, tuple[Broken, ...]]
"""The images of a run, and the files that are left out of them."""

MOST_THREADS = 8


def open_data(
    data: DataOptions, *, seed: int, skipped: Sequence[Broken] = (), decodes_test: bool = True
) -> Source:
    """The images that the settings of a run name, but for the files that the run left out.

    Without `decodes_test` a test set stays in its files: training never looks at it.

    Raises:
        InputError, RunFailed: as `open_source`.
    """
    source = open_source(
        data.data,
        val_fraction=data.val_fraction,
        seed=seed,
        test_split=data.test_split,
        exif_orientation=data.exif_orientation,
        max_train_samples=data.max_train_samples,
        max_val_samples=data.max_val_samples,
        decodes_test=decodes_test,
    )
    return without(source, skipped)


def sound_images(s: Settings, accelerator: Any, *, say: Say, fresh: bool) -> Opened:
    """The images of a run whose files can be read, and those that are left out; a collective.

    Args:
        s: all settings.
        accelerator: each of its ranks reads its share of the files.
        say: prints a line.
        fresh: no run goes on, so the files are looked at before the first update.

    Raises:
        InputError: files can't be read, and `skip_corrupt` does not say that they are left out.
    """
    data, seed = s.data, s.run.seed
    source = on_each_rank(accelerator, lambda: open_data(data, seed=seed, decodes_test=False))
    if not num_entries(source):
        if data.skip_corrupt and fresh:
            raise InputError(
                f"--data {data.data} has its images in memory, all of them decoded, so nothing "
                "reads --skip-corrupt true. Leave it out."
            )
        return source, ()
    run = s.run.resume
    if data.skip_corrupt and run is not None:
        kept = decided(accelerator, lambda: read_skipped(run_of(Path(run))))
        if kept is not None:
            return on_each_rank(accelerator, lambda: without(source, kept)), kept
    if not data.skip_corrupt and not fresh:
        return source, ()
    broken = _broken(source, accelerator, whole=data.skip_corrupt, say=say)
    if broken and not data.skip_corrupt:
        raise InputError(
            f"{len(broken)} of the {num_entries(source)} images of --data {data.data} can't be "
            f"read: {listed(broken, source)}. Mend or remove them, or add --skip-corrupt: it reads "
            f"all images first, leaves out those that can't be read, and lists them in {SKIPPED}."
        )
    if broken:
        say(
            f"skip: {len(broken)} of {num_entries(source)} images can't be read and are left "
            f"out: {printable(listed(broken, source))} (all are listed in {SKIPPED})"
        )
    return on_each_rank(accelerator, lambda: without(source, broken)), broken


def write_skipped(run: Path, broken: Sequence[Broken]) -> None:
    """Keep the list of the files that a run leaves out, so that a resume need not look again."""
    rows = [b._asdict() for b in broken]
    atomic_write_text(run / SKIPPED, json.dumps({"skipped": rows}, indent=1) + "\n")


def read_skipped(run: Path) -> tuple[Broken, ...] | None:
    """The files that a run leaves out; None where it kept no list that can be read.

    Raises:
        CannotRead: the system refuses to read the list.
    """
    path = run / SKIPPED
    if not path.exists():
        return None
    try:
        rows = [Broken(r["split"], r["name"], r["reason"]) for r in json_in(path)["skipped"]]
    except (Malformed, KeyError, TypeError):
        return None
    whole = all(isinstance(part, str) for row in rows for part in row)
    return tuple(rows) if whole else None


def _broken(source: Source, accelerator: Any, *, whole: bool, say: Say) -> tuple[Broken, ...]:
    """The files that can't be read, of all ranks' shares, in one order."""
    ranks = accelerator.num_processes
    cores = max(1, (os.cpu_count() or 1) // local_world_size())
    share = Share(accelerator.process_index, ranks, min(MOST_THREADS, cores))
    mine = on_each_rank(
        accelerator, lambda: broken_images(source, whole=whole, share=share, say=say)
    )
    parts: list[Any] = [mine]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, mine)
    return tuple(sorted(b for part in parts for b in part))
