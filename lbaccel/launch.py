"""The variables that a launcher or a user sets for this process; no other module reads them.

The ranks are what a launcher (torchrun, accelerate) sets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

OMP_THREADS, VISIBLE_GPUS = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
PARENT = os.getppid()  # of this process as it started: a launcher, where there is one


def unsupported_platform(name: str = sys.platform) -> str | None:
    """A sentence where nobody has run lbaccel on this platform; None on Linux and macOS.

    >>> unsupported_platform("linux") is None
    True
    """
    if name.startswith(("linux", "darwin")):
        return None
    return (
        f"warning: lbaccel was not run on {name} by its developers. Checkpoints need symbolic "
        "links, and a limit on memory is not enforced there. Linux or WSL 2 is supported."
    )


def rank() -> int:
    """This process among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def asks_for_ranks() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_world_size() -> int:
    """Processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def under_elastic_launcher() -> bool:
    """Whether torchrun, or accelerate through it, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def asks_for_fsdp() -> bool:
    """Whether FSDP was asked for, by a launcher or by a plugin given to `Accelerator`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed() -> bool:
    """Whether a launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def deepspeed_config_file() -> str | None:
    """The DeepSpeed JSON that a launcher names: a path, or the text itself in base64."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if named == "none" else named


def chose_threads() -> bool:
    """Whether somebody set how many threads a process of this machine has."""
    return OMP_THREADS in os.environ


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names of the GPUs that a process may be given, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get(VISIBLE_GPUS)
    if visible is not None:
        return [word.strip() for word in visible.split(",") if word.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def with_variables(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process for a child, with more variables."""
    return {**os.environ, **more}


def keeps_all_output() -> bool:
    """Whether a notebook or a continuous integration reads this: it keeps each state of a bar.

    A notebook's `!command` runs on a terminal of its own, so that `isatty` does not tell.
    """
    marks = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "CI")
    return os.environ.get("TERM") == "dumb" or any(os.environ.get(name) for name in marks)


def drop_foreign_plot_backend() -> None:
    """Forget a notebook's way to draw that this interpreter lacks, before matplotlib is imported.

    A notebook hands MPLBACKEND on to its `!command`. Where that command runs in another environment
    that lacks the module named there, importing matplotlib would fail.
    """
    named = os.environ.get("MPLBACKEND", "")
    module = named.removeprefix("module://")
    if module != named and find_spec(module.partition(".")[0]) is None:
        del os.environ["MPLBACKEND"]


def extensions_folder() -> Path | None:
    """Where torch builds its extensions, if a variable says so; None is a folder of caches."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else None


def calibration_file() -> Path:
    """This user's calibrated devices: $LBACCEL_CALIBRATION, or a file in the folder of caches."""
    named = os.environ.get("LBACCEL_CALIBRATION")
    if named:
        return Path(named).expanduser()
    return _caches() / "calibration.json"


def kernels_folder() -> Path | None:
    """Where plans keep what they measured of kernels; None where $LBACCEL_KERNELS is "off".

    $LBACCEL_KERNELS may name another folder than that in the folder of caches.
    """
    return _kept("kernels")


def estimates_folder() -> Path | None:
    """Where plans keep what they traced of networks; $LBACCEL_ESTIMATES is as the other one."""
    return _kept("estimates")


def _kept(what: str) -> Path | None:
    named = os.environ.get(f"LBACCEL_{what.upper()}")
    if named == "off":
        return None
    return Path(named).expanduser() if named else _caches() / what


def _caches() -> Path:
    """lbaccel's folder in this user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "lbaccel"


def variables(*starts: str) -> dict[str, str]:
    """The variables whose names start so: what launchers, builds and trackers would find here."""
    return {name: value for name, value in os.environ.items() if name.startswith(starts)}
