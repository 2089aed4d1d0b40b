"""The allocations of kernels that this processor has run, kept from plan to plan in a file.

A kernel's allocations depend on the processor, on torch and on the call alone, so a plan need not
run a kernel that an earlier plan of any network ran (`lbaccel.launch.kernels_folder`).
"""

from __future__ import annotations

import contextlib
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lbaccel.launch import kernels_folder
from lbaccel.planning.cost.kept import KeptResults, name_of
from lbaccel.planning.cost.processor import instruction_set

MOST = 20_000  # kernels, about 2 MiB


class KeptKernels(KeptResults[tuple[int, ...]]):
    """Allocations by call.

    Args:
        path: of the file; None: nothing is kept.
        processor: the kernels of another one are not taken.
    """

    def __init__(self, path: Path | None, processor: str) -> None:
        super().__init__(path, processor, most=MOST)

    def _to_json(self, result: tuple[int, ...]) -> Any:
        return list(result)

    def _from_json(self, value: Any) -> tuple[int, ...]:
        if type(value) is not list or not all(type(n) is int for n in value):
            raise ValueError(value)
        return tuple(value)


def kept_kernels() -> KeptKernels:
    """Those of this user and this processor."""
    return _kept(kernels_folder())


@lru_cache(maxsize=4)
def _kept(folder: Path | None) -> KeptKernels:
    processor = this_processor()
    return KeptKernels(
        None if folder is None else folder / f"{name_of(processor)[:16]}.json", processor
    )


def this_processor() -> str:
    """All but the call that allocations depend on: the processor, torch, and its libraries."""
    return "\n".join(
        (instruction_set(), _model_of_processor(), torch.__version__, torch.__config__.show())
    )


def _model_of_processor() -> str:
    """Its model and instructions as Linux says, else its name."""
    wanted = ("model name", "cpu family", "model", "stepping", "cache size", "flags", "Features")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        found = [line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted]
        if found:
            return "\n".join(found)
    return f"{platform.machine()} {platform.processor()}"
