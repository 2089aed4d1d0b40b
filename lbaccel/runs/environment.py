"""The environment of a run: versions, devices, command, commit (torch only inside functions)."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from lbaccel.runs.folder import ENVIRONMENT, RUN_NAME, atomic_write_text, strict_json

PACKAGES = ("lbaccel", "torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "deepspeed")


def write_env(run: Path, *, seed: int | None = None, argv: Iterable[str] | None = None) -> None:
    """Write `env.json`: what ran the run, without the name of the host. `argv` is sys.argv."""
    import torch

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


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those packages that are installed; without a list, of those that a result depends on."""
    return {package: v for package in packages if (v := version(package)) is not None}


def version(package: str) -> str | None:
    """The version of a package, which is not imported; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model."""
    found = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.M)
    return found[1] if found else platform.processor() or platform.machine()


def instructions() -> frozenset[str]:
    """The processor's instruction sets as Linux names them, such as "avx2"; else none."""
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _text("/proc/cpuinfo"), re.M)
    return frozenset(found[1].split() if found else ())


def driver() -> str | None:
    """The version of NVIDIA's driver, where one is loaded."""
    text = _text("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", text)
    return found[1] if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git_commit() -> str | None:
    """The commit checked out in the current folder, or None outside a repository or without git."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
