"""The folder of a run and its small files: settings, environment, summary."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from lbaccel.errors import InputError, RunFailed

PACKAGES = ("lbaccel", "torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "deepspeed")


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
    """Write a file whole or not at all: beside it in the same folder, fsync, then rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
    atomic_write_text(run / "config.yaml", text)


def write_summary(run: Path, mapping: Mapping[str, Any]) -> None:
    """Write `summary.json`: status, best and last metrics, updates, samples, seconds, peak GiB."""
    atomic_write_text(run / "summary.json", strict_json(mapping, indent=2) + "\n")


def write_env(run: Path, *, seed: int | None = None, argv: Iterable[str] | None = None) -> None:
    """Write `env.json`: what ran the run, without the name of the host. `argv` is sys.argv."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = {
        "command": shlex.join(sys.argv if argv is None else argv),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": devices or ["cpu"],
        "cuda": torch.version.cuda,
        "git_commit": _git_commit(),
        "versions": versions(),
    }
    atomic_write_text(run / "env.json", strict_json(environment, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {package: v for package in PACKAGES if (v := _version(package)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit checked out in the current folder, or None outside a repository or without git."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
