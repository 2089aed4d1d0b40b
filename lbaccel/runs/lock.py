"""One run, one writer: the lock of a run folder, and the process that holds it (no torch)."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lbaccel.errors import RunFailed
from lbaccel.runs.folder import LOCK, WRITER, atomic_write_text

Say = Callable[[str], object]
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_LAST_WORKERS_SECONDS = 20.0  # a killed process's loader workers look for it every few seconds
_DYING_SECONDS = 5.0  # a process that was just killed is there until its memory is given back
_LOOK_EVERY_SECONDS = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """The process that writes into a run folder."""

    process: int
    host: str
    kernel: str  # of one start of one machine, the same in all its containers; "" where unknown
    started: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.started}"

    def was_here(self) -> bool:
        """Whether it ran on this machine, before or after a restart of it."""
        return self.host == platform.node() or (self.kernel != "" and self.kernel == _kernel())

    def is_gone(self) -> bool:
        """Whether this machine is known to have no such process."""
        if not self.was_here():
            return False
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # of another user
            return False
        return False


def _kernel() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _this_process() -> Holder:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(os.getpid(), platform.node(), _kernel(), started)


def holder_of(folder: Path) -> Holder | None:
    """The last process that began to write into a run folder and has not said that it ended."""
    try:
        found = json.loads((folder / WRITER).read_text(encoding="utf-8"))
        texts = (str(found[name]) for name in ("host", "kernel", "started"))
        return Holder(int(found["process"]), *texts)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process may be writing into a run folder, by what the last one left there."""
    holder = holder_of(folder)
    return holder is not None and not holder.is_gone()


_held: dict[tuple[int, Path], tuple[FileLock | None, int]] = {}
"""(process, folder) to its lock, and how often this process took it; a forked child has none."""


def take(folder: Path, *, say: Say, instead: str = "") -> None:
    """Become the one writer of a run folder, until `give_back`; a process may take it repeatedly.

    A lock of the operating system goes with its process, so one that a killed process left is
    free; a line says so. A run folder that this process can't write into needs no lock.

    Args:
        folder: there already.
        say: prints a line.
        instead: what else the user can type where another process holds it.

    Raises:
        RunFailed: another process writes into it, or one of another machine may do so still.
    """
    key = (os.getpid(), folder.resolve())
    if key in _held:
        lock, count = _held[key]
        _held[key] = (lock, count + 1)
        return
    before = holder_of(folder)
    try:
        lock = _locked(folder, before, say=say, instead=instead)
        if lock is not None:
            atomic_write_text(folder / WRITER, json.dumps(asdict(_this_process())) + "\n")
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        lock = None
    _held[key] = (lock, 1)


def give_back(folder: Path) -> None:
    """Let others write into a run folder, after as many calls as `take` had."""
    key = (os.getpid(), folder.resolve())
    lock, count = _held.pop(key, (None, 0))
    if count > 1:
        _held[key] = (lock, count - 1)
    elif lock is not None:
        try:
            (folder / WRITER).unlink(missing_ok=True)
        finally:
            lock.release()


@contextmanager
def writing(folder: Path, *, say: Say, instead: str = "") -> Iterator[None]:
    """A block in which this process is the one writer of a run folder; see `take`."""
    take(folder, say=say, instead=instead)
    try:
        yield
    finally:
        give_back(folder)


def _locked(folder: Path, before: Holder | None, *, say: Say, instead: str) -> FileLock | None:
    """The lock of the operating system; None where the file system has none."""
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        _wait_for(lock, before)
    except Timeout:
        who = holder_of(folder) or "another process"
        raise RunFailed(
            f"{folder} is being written by {who}, and a run has one writer. Wait for its end, or "
            f"stop it{instead}."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        say(f"warning: {folder} lies where files can't be locked: let no second process write it")
        return None
    try:
        _take_over(folder, before, say=say, instead=instead)
    except BaseException:
        lock.release()
        raise
    return lock


def _wait_for(lock: FileLock, before: Holder | None) -> None:
    """Acquire it, and give its holder, or what is left of it, the time to come to an end.

    Raises:
        Timeout: it is held still.
    """
    if before is None or not before.was_here():
        lock.acquire(timeout=0)
        return
    start = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_LOOK_EVERY_SECONDS)
            return
        except Timeout:
            waited = time.monotonic() - start
            if waited > (_LAST_WORKERS_SECONDS if before.is_gone() else _DYING_SECONDS):
                raise


def _take_over(folder: Path, before: Holder | None, *, say: Say, instead: str) -> None:
    """Say which process left the folder without a word, or stop where it may go on elsewhere."""
    if before is None:
        return
    if before.was_here():
        say(f"{folder} was left by {before}, which did not come to its end: it is taken over")
        return
    raise RunFailed(
        f"{folder} was last written by {before}, and from here nobody can see whether it still "
        f"runs. Wait for its end, or stop it{instead}. If it is gone, type: rm {folder / WRITER}"
    )
