"""Lock files that a killed build of a torch extension left: every later start waits for them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lbaccel.errors import InputError
from lbaccel.launch import extensions_folder

SHARED_MEMORY = "deepspeed_shm_comm"  # which CPU ranks talk through
CPU_ADAM = "cpu_adam"
LOCK = "lock"


def stale_locks() -> list[Path]:
    """Locks in torch's folder of built extensions that no process of this machine holds.

    torch (2.6) waits without end, and without a word, while such a file exists; its holder keeps it
    open. Later versions (2.15) leave the file behind and wait for no dead holder: there is none
    that is stale.
    A process on another host or in another container that shares the folder can't be seen from
    here.
    """
    named = extensions_folder()
    if named is not None:
        found = list(named.glob(f"*/{LOCK}"))
    else:
        from torch.utils.cpp_extension import get_default_build_root

        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        found = list(Path(get_default_build_root()).glob(f"{python}_*/*/{LOCK}"))
    if not found or not _is_waited_for():
        return []
    if not Path("/proc/self/fd").is_dir():  # no way to see who holds them
        return []
    held = _open_files()
    # a build that ended since the first look has taken its lock away
    return sorted(path for path in found if str(path.resolve()) not in held and path.exists())


def check_build_locks(needed: Iterable[str]) -> str | None:
    """A warning of stale locks that do not concern the operators `needed`; None without any.

    Args:
        needed: names of the operators that this start builds or loads.

    Raises:
        InputError: an operator that is needed has a stale lock: the start would wait without end.
    """
    locks, needed = stale_locks(), set(needed)
    blocking = [path for path in locks if path.parent.name in needed]
    if blocking:
        names = ", ".join(path.parent.name for path in blocking)
        raise InputError(
            f"a killed build left the lock of {names}, and no process of this machine holds it: "
            "this start would wait for it without end. If no other host or container builds in "
            f"this folder now, type: {removal(blocking)}"
        )
    if locks:
        return (
            "warning: killed builds left locks of torch extensions, which this run does not need. "
            f"If no other host or container builds there now: {removal(locks)}"
        )
    return None


def removal(locks: Iterable[Path]) -> str:
    """The line to type that removes locks."""
    return shlex.join(["rm", *map(str, locks)])


def _is_waited_for() -> bool:
    """Whether this torch waits while the file exists, not for a lock that the system ends."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


def _open_files() -> set[str]:
    """Paths of the files that are open in the processes that this user may look into."""
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            for entry in folder.iterdir():
                with suppress(OSError):  # closed since
                    found.add(str(entry.readlink()))
        except OSError:  # ended since, or of another user
            continue
    return found
