"""This machine as a bug report shows it: no key, no token, no name of the user.

Packages are asked for their versions and not imported. torch and accelerate, which know more, may
be broken: their errors are part of the report.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lbaccel.documents import yaml_in
from lbaccel.errors import brief
from lbaccel.launch import variables
from lbaccel.runs.environment import PACKAGES, driver, instructions, processor, versions
from lbaccel.text import one_line, without_tokens

# launchers, trackers, hubs, libraries of kernels and of communication, this package
VARIABLES = (
    *("ACCELERATE_", "FSDP_", "DS_", "TORCH", "PYTORCH_", "TRITON_", "LBACCEL_"),
    *("WANDB_", "HF_", "HUGGING", "XDG_CACHE_HOME"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("OMP_", "MKL_", "KMP_", "ONEDNN_", "DNNL_", "ATEN_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_"),
)
_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve", "bf16")
_HIDDEN = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|ADDR|HOST|_IP|ENTITY|USER|MAIL")
_RANDOM = re.compile(r"(?=.*\d)[A-Za-z0-9_+=-]{32,}")  # as keys look, whatever their variable
NOT_SHOWN = "(set, not shown)"
_TOOLS = re.compile(r"extra\s*==\s*['\"](test|docs)['\"]")  # nothing of a run depends on them


def bug_report() -> dict[str, Any]:
    """Versions, processor, devices, accelerate's default config and variables of this machine."""
    return {
        "lbaccel": versions(["lbaccel"]).get("lbaccel", "not installed: run from its sources"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processor": processor(),
        "instructions": [name for name in _SETS if name in instructions()],
        "cpu_count": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "driver": driver(),
        "packages": versions(_packages()),
        "torch": _of_torch(),
        "accelerate_config": _accelerate_config(),
        "variables": {k: safe(k, v) for k, v in sorted(variables(*VARIABLES).items())},
    }


def safe(name: str, value: object) -> str:
    """A value that may be published: secrets are left out, the home folder is `~`.

    >>> safe("WANDB_API_KEY", "abc"), safe("OMP_NUM_THREADS", "2")
    ('(set, not shown)', '2')
    """
    text = str(value)
    if text and (_HIDDEN.search(name.upper()) or _RANDOM.fullmatch(text)):
        return NOT_SHOWN
    return one_line(_short(without_tokens(text)))[:300]


def _short(text: str) -> str:
    home = Path("~").expanduser()
    text = text.replace(str(home), "~") if len(str(home)) > 1 else text
    names = {home.name, os.environ.get("USER", ""), os.environ.get("LOGNAME", "")} - {"", "root"}
    for name in names:  # in other folders of the same person
        text = re.sub(rf"(?<=/){re.escape(name)}(?=/|:|$)", "USER", text)
    return text


def _packages() -> list[str]:
    """Those of `PACKAGES`, and all that this package can use."""
    named: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        needed = [line for line in metadata.requires("lbaccel") or () if not _TOOLS.search(line)]
        named = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in needed]
    return [name for name in dict.fromkeys([*PACKAGES, *named]) if name != "lbaccel"]


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(total / 2**30, 1)


def _of_torch() -> dict[str, Any]:
    try:
        import torch

        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
            "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "devices": [
                f"{d.name}, {d.total_memory / 2**30:.1f} GiB, compute {d.major}.{d.minor}"
                for d in devices
            ],
        }
    except Exception as error:  # a broken build is what the report may be about
        return {"error": _failed(error)}


def _accelerate_config() -> dict[str, Any] | None:
    """The file that `accelerate launch` reads without `--config_file`; None where there is none."""
    try:
        from accelerate.commands.config.config_args import default_config_file

        path = Path(default_config_file)
        if not path.is_file():
            return None
        content = yaml_in(path)
    except Exception as error:
        return {"error": _failed(error)}
    shown = _leaves(content) if isinstance(content, Mapping) else {"": brief(content)}
    return {"file": _short(str(path)), **{name: safe(name, value) for name, value in shown.items()}}


def _leaves(content: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{before}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _failed(error: Exception) -> str:
    return safe("", f"{type(error).__name__}: {error}")
