"""The allocations of kernels that this processor has run, kept from plan to plan in a file.

A kernel's allocations depend on the processor, on torch and on the call alone, so a plan need not
run a kernel that an earlier plan of any network ran. The file lies in the user's folder of caches
(`lbaccel.launch.kernels_folder`); it may be deleted at any time, and one that is damaged, or that
nobody may write to, is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lbaccel.documents import json_in
from lbaccel.errors import InputError
from lbaccel.launch import kernels_folder
from lbaccel.planning.cost.processor import instruction_set
from lbaccel.runs.folder import atomic_write_text

FORM = 1  # of the file and of its keys
MOST = 20_000  # kernels, about 2 MiB; a file with more begins anew


class KeptKernels:
    """Allocations by call; with `path` None nothing is kept.

    Args:
        path: of the file.
        processor: the kernels of another one are not taken.
    """

    def __init__(self, path: Path | None, processor: str) -> None:
        self._path, self._processor = path, processor
        self._kernels = self._read()
        self._is_saved = True

    def get(self, call: Any) -> tuple[int, ...] | None:
        """The allocations of `call`, whose `repr` says all that they depend on; None: unknown."""
        return self._kernels.get(_name(call))

    def put(self, call: Any, taken: tuple[int, ...]) -> None:
        """Keep the allocations of `call`; `save` writes them."""
        if self._path is not None:
            self._kernels[_name(call)] = taken
            self._is_saved = False

    def save(self) -> None:
        """Write what is new, beside what other processes have written; a failure is no error."""
        if self._is_saved or self._path is None:
            return
        self._is_saved = True
        kernels = self._read() | self._kernels
        if len(kernels) > MOST:
            kernels = self._kernels if len(self._kernels) <= MOST else {}
        document = {"form": FORM, "processor": self._processor, "kernels": kernels}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._path, json.dumps(document, separators=(",", ":")))

    def _read(self) -> dict[str, tuple[int, ...]]:
        """The file's kernels; none where it is damaged, or another processor's."""
        if self._path is None:
            return {}
        try:
            document = json_in(self._path)
            if (document["form"], document["processor"]) != (FORM, self._processor):
                return {}
            kernels = {name: tuple(taken) for name, taken in document["kernels"].items()}
        except (OSError, InputError, ValueError, LookupError, TypeError, AttributeError):
            return {}
        whole = all(type(n) is int for taken in kernels.values() for n in taken)
        return kernels if whole else {}


def kept_kernels() -> KeptKernels:
    """Those of this user and this processor."""
    return _kept(kernels_folder())


@lru_cache(maxsize=4)
def _kept(folder: Path | None) -> KeptKernels:
    processor = _processor()
    file = f"{hashlib.sha256(processor.encode()).hexdigest()[:16]}.json"
    return KeptKernels(None if folder is None else folder / file, processor)


def _processor() -> str:
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


def _name(call: Any) -> str:
    return hashlib.sha256(repr(call).encode()).hexdigest()[:32]
