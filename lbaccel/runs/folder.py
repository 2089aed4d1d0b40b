"""The folder of a run: the names of all its files, its settings and summary (no torch)."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError, RunFailed

# the names of all files and folders of a run
CONFIG, SUMMARY, ENVIRONMENT = "config.yaml", "summary.json", "env.json"
METRICS, TABLE = "metrics.jsonl", "metrics.csv"
RESUMES, DECISIONS, PLOTS = "resumes.jsonl", "batch_decisions.jsonl", "plots"
SKIPPED = "skipped.json"  # image files that the run leaves out
EVALUATIONS, EVALUATED = "eval", "predictions.csv"  # of `lbaccel eval`: its folder and its table
LOCK, WRITER = ".writer.lock", ".writer.json"
RUN_NAME = "run"  # key of the environment: the name that the folder was made with
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"
BEST_EMA = "best-ema"  # the best evaluation of the averaged weights
ABANDONED, ABANDONED_METRICS = "abandoned-", "metrics_abandoned.jsonl"  # past a resume's update
# of a checkpoint
MANIFEST, STATE, CLASSES = "manifest.json", "state.pt", "classes.json"
CONTRACT = "contract.json"
PREPROCESSING, MODEL, MODEL_EMA = "preprocessing.json", "model", "model_ema"
ARCHITECTURE = "config.json"  # of an export: timm's description, which the hub looks for
# beside a folder that is being written: the new one until it is whole, the old one while it goes
WRITING, REPLACED = ".writing-", ".replaced-"
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def new_run_folder(root: Path, name: str) -> Path:
    """Make `<root>/<YYYYmmdd-HHMMSS>-<name>`, and never give out a folder that was there before.

    Whatever is not a letter, a digit or one of `. _ = + -` in `name` becomes `-`, so the folder
    lies in `root`. A clash within one second adds `-2`, `-3`.

    Raises:
        InputError: `root` cannot hold folders, or `name` has no letter or digit.
    """
    clean = re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.")[:100]
    if not re.search(r"[A-Za-z0-9]", clean):
        raise InputError(
            f"name={name!r} gives no folder name: it needs at least one letter or digit. "
            f"Use a name such as resnet50-gbs4096."
        )
    stem = f"{_timestamp()}-{clean}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for count in range(1, 1000):
            folder = root / (stem if count == 1 else f"{stem}-{count}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise InputError(
            f"output={str(root)!r} cannot hold run folders: {error.strerror}. "
            f"Use a folder that you may write to."
        ) from error
    raise RunFailed(f"{root / stem}: 999 runs of this name started within one second.")


def _timestamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8: see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it in the same folder, fsync, then rename.

    A link at `path` is replaced; nothing is written where it leads.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place by a rename when the block has ended.

    Nobody sees a part of the new folder under the name `target`: its files are on the disk before
    the rename. A fault inside the block leaves `target` as it was and nothing beside it. Where
    `target` has files, it is renamed aside first and removed last, and it comes back where the
    new folder can't take its place. (A process that is killed between these two renames leaves
    the old folder beside, under a name that begins with `REPLACED`.)

    Args:
        target: a folder, there or not; missing parents are made.

    Raises:
        OSError: the disk is full or not writable.

    >>> with tempfile.TemporaryDirectory() as home:
    ...     with written_beside(Path(home, "run", "export")) as folder:
    ...         _ = (folder / "README.md").write_text("whole")
    ...     sorted(path.name for path in Path(home, "run").rglob("*"))
    ['README.md', 'export']
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=WRITING, dir=target.parent))
    try:
        yield beside
        _open_to_others(beside)
        _flush(beside)
        _take_the_place(target, beside)
    finally:  # after an interrupt too
        shutil.rmtree(beside, ignore_errors=True)


def point_link(link: Path, target: str) -> None:
    """Turn a symbolic link to the checkpoint `target` beside it, in one step.

    Where the file system has no links (Google Drive, FAT), a file holds the name in its place:
    see `follow_link`.
    """
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        atomic_write_text(link, f"{target}\n")
        return
    beside.replace(link)


def linked_name(link: Path) -> str | None:
    """The name of the checkpoint that `point_link` wrote there; None where there is no link."""
    if link.is_symlink():
        return link.readlink().name
    if not link.is_file():
        return None
    name = Path(link.read_text(encoding="utf-8", errors="replace").strip()[:100])
    return name.name if update_of(name) is not None else None


def follow_link(link: Path) -> Path:
    """The checkpoint that a link leads to; any other path as it is.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "last").write_text("update_000020\\n")
    ...     follow_link(Path(folder, "last")).name, follow_link(Path(folder, "best")).name
    ('update_000020', 'best')
    """
    if link.is_symlink() or not link.is_file():
        return link
    name = linked_name(link)
    return link if name is None else link.with_name(name)


def _open_to_others(folder: Path) -> None:
    """Give a folder and its files the mode that the umask gives to new ones.

    A temporary folder is its owner's alone, and so are the files that safetensors writes. A folder
    that is made here tells the mode: `os.umask` would change the process to be asked.
    """
    probe = folder / ".mode"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in folder.iterdir():
        path.chmod(mode if path.is_dir() else mode & 0o666)
    folder.chmod(mode)


def _flush(folder: Path) -> None:
    """Bring the files and the folder to the disk: a rename must not overtake them."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_the_place(target: Path, beside: Path) -> None:
    """Rename `beside`; a folder with files, over which no rename goes, is put aside meanwhile."""
    if not target.exists():
        beside.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=REPLACED, dir=target.parent))
    try:
        target.rename(aside)
        beside.rename(target)
    except BaseException:  # an interrupt too
        if not target.exists():
            aside.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def plain(value: Any, *, finite: bool = False) -> Any:
    """The value out of dicts, lists, strings, numbers and None; with `finite` NaN is None too.

    >>> plain({"betas": (0.9, 0.95), "output": Path("runs")})
    {'betas': [0.9, 0.95], 'output': 'runs'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, finite=finite) for item in value]
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()  # a tensor or array without dimensions
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    for kind in (bool, int, float, str):  # an IntEnum becomes an int, a numpy.float64 a float
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """JSON without the NaN and Infinity that other parsers refuse: they become null.

    >>> strict_json({"update": 3, "train/loss": float("nan")})
    '{"update": 3, "train/loss": null}'
    """
    numbers = plain(value, finite=True)
    return json.dumps(numbers, indent=indent, allow_nan=False, ensure_ascii=False)


def write_config(run: Path, mapping: Mapping[str, Any]) -> None:
    """Write `config.yaml`: the settings in the order given, `plan` and `origin` nested."""
    text = yaml.safe_dump(plain(mapping), sort_keys=False, allow_unicode=True)
    atomic_write_text(run / CONFIG, text)


def write_summary(run: Path, mapping: Mapping[str, Any]) -> None:
    """Write `summary.json`: status, best and last metrics, updates, samples, seconds, peak GiB."""
    atomic_write_text(run / SUMMARY, strict_json(mapping, indent=2) + "\n")


def checkpoint_name(update: int) -> str:
    """Of the checkpoint after so many updates.

    >>> checkpoint_name(40)
    'update_000040'
    """
    return f"update_{update:06d}"


def update_of(path: Path) -> int | None:
    """How many updates a checkpoint holds, by its name; None where it is no checkpoint's name.

    >>> update_of(Path("checkpoints/update_000040")), update_of(Path("checkpoints/last"))
    (40, None)
    """
    match = re.fullmatch(r"update_(\d{6,})", path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; what was not written to its end is none."""
    if not folder.is_dir():
        return []
    found = {path: update for path in folder.iterdir() if (update := update_of(path)) is not None}
    return sorted(found, key=lambda path: -found[path])


def weights_file(stem: str) -> str:
    """The file of a checkpoint's weights: of `MODEL`, or of `MODEL_EMA`."""
    return f"{stem}.safetensors"


def run_of(path: Path) -> Path:
    """The run folder that a path names: itself, or the one a checkpoint lies in.

    Raises:
        InputError: the path is neither.
    """
    for folder in (path, path.parent.parent):
        if (folder / CONFIG).is_file():
            return folder
    what = f"is no run folder: it holds no {CONFIG}" if path.exists() else "does not exist"
    raise InputError(
        f"--resume {path} {what}. Give a folder such as runs/20261121-001312-resnet10t-gbs512, "
        "a checkpoint in it, or 'auto'."
    )
