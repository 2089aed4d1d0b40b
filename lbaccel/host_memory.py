"""The memory of this machine, or of the container that the process is in (no torch)."""

from __future__ import annotations

from pathlib import Path

from lbaccel.errors import InputError


def host_memory() -> tuple[int, int]:
    """Available and total bytes of this machine, or of its container where that is less.

    Raises:
        InputError: the system does not say.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError as error:
        raise InputError(
            "the free memory of this system can't be read. Give --memory, such as --memory 8GiB."
        ) from error
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    available, total = (1024 * kib[name] for name in ("MemAvailable", "MemTotal"))
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available, total = min(available, limit - used), min(total, limit)
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return available, total
