"""The environment of a run: versions, devices, command, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from lbaccel.runs.folder import ENVIRONMENT, RUN_NAME, atomic_write_text, strict_json

PACKAGES = ("lbaccel", "torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "deepspeed")


def write_env(run: Path, *, seed: int | None = None, argv: Iterable[str] | None = None) -> None:
    """Write `env.json`: what ran the run, without the name of the host. `argv` is sys.argv."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = {
        RUN_NAME: run.resolve().name,
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
    atomic_write_text(run / ENVIRONMENT, strict_json(environment, indent=2) + "\n")


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
