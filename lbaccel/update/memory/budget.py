"""A memory budget: read from text, taken from what is free, and enforced."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lbaccel.errors import InputError, brief
from lbaccel.host_memory import host_memory

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
MOST_BYTES = 2**63  # what an address of 64 bits, and torch, can count
MARGIN_SHARE = 0.03  # of the device: the driver, a display, fragments
MARGIN_BYTES = 256 * 2**20


def parse_memory(text: str, *, name: str = "memory") -> int:
    """Bytes, from a number and its unit; `name` is the argument's in the error.

    >>> parse_memory("1.5GiB"), parse_memory("500 MB")
    (1610612736, 500000000)

    Raises:
        InputError: no unit, an unknown one, or nothing left of the number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", str(text))
    units = {unit.lower(): size for unit, size in UNITS.items()}
    asked = float(found[1]) * units.get(found[2].lower(), 0) if found else 0.0
    num_bytes = int(asked) if asked < MOST_BYTES else 0
    if num_bytes < 1:
        raise InputError(
            f"{name}={brief(text)} is no size. Use a number above 0 and a unit, such as 8GiB "
            f"({', '.join(UNITS)})."
        )
    return num_bytes


def default_budget(device: torch.device, *, ranks: int = 1) -> int:
    """Bytes free now, less a margin (3 %, at least 256 MiB); of a host, this rank's share of them.

    On a GPU what torch's allocator holds already counts as free.

    Raises:
        InputError: no more than the margin is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
    else:
        free, total = host_memory()
        free //= ranks
    budget = free - max(MARGIN_BYTES, int(MARGIN_SHARE * total))
    if budget <= 0:
        raise InputError(
            f"only {free / 2**30:.2f} GiB of {total / 2**30:.2f} GiB are free on {device}. "
            "Stop what uses the rest, or choose another device."
        )
    return budget


@contextmanager
def memory_limit(num_bytes: int, device: torch.device) -> Iterator[str]:
    """Inside, an allocation above the budget fails as it would on a smaller device; yields a line.

    On CUDA the caching allocator of this process is capped (the context, some 0.5 GiB, comes on
    top); Windows and WSL, whose driver would spill into host memory, fail cleanly so. On a CPU
    under Linux the private memory in use may grow by `num_bytes` over what it is now: an update
    stops after the first operator that exceeds it, and the system refuses what exceeds it by more
    than 256 MiB.

    Raises:
        InputError: more than the device has, or a system without such a limit.
    """
    gib = num_bytes / 2**30
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if num_bytes > total:
            raise InputError(
                f"memory={gib:.2f} GiB is more than the {total / 2**30:.2f} GiB of {device}. "
                f"Use at most {total / 2**30:.2f}GiB."
            )
        torch.cuda.set_per_process_memory_fraction(num_bytes / total, device)
        try:
            yield f"memory: at most {gib:.2f} GiB on {device} (of {total / 2**30:.2f} GiB)"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    if sys.platform != "linux":
        raise InputError("a memory budget of a CPU is enforced on Linux only. Leave it out.")
    from lbaccel.update.memory.host_limit import host_limit

    with host_limit(num_bytes):
        yield f"memory: at most {gib:.2f} GiB more than the process has now"
