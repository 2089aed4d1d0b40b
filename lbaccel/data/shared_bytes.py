"""Memory that the processes of one machine share: no file of it is left, however they end."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbaccel.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKEN = 64  # bytes at the start, by which another process knows that it has the right memory


class SharedBytes:
    """Zeroed memory that processes write and read, and a lock for them.

    Linux gives a page of it when it is first written. It is an anonymous file (memfd_create(2)), so
    neither the size of /dev/shm bounds it nor does a killed process leave a file; other systems
    have a nameless file in the folder for temporary files. Worker processes get it by fork or by
    pickle, other processes of the same user by `address`.

    Args:
        num_bytes: of all, the 64 before `bytes` too.

    Attributes:
        bytes: uint8 [num_bytes - 64], the memory itself.

    Raises:
        InputError: the system does not give so many addresses, or is Windows, which has not the
            locks.

    >>> memory = SharedBytes(72)
    >>> with memory.locked():
    ...     _ = memory.bytes.fill_(3)
    >>> SharedBytes.at(memory.address).bytes.tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    def __init__(self, num_bytes: int) -> None:
        if fcntl is None:
            raise InputError("memory that processes share is to be had on Linux and macOS only.")
        fd = _nameless_file()
        try:
            os.ftruncate(fd, num_bytes)
            self._take(fd)
        except (OSError, OverflowError, ValueError) as error:
            os.close(fd)
            raise InputError(
                f"{num_bytes / 2**30:.2f} GiB of shared memory are not to be had here ({error}). "
                "Ask for less."
            ) from error
        self._memory[:TOKEN] = secrets.token_bytes(TOKEN)

    @classmethod
    def at(cls, address: tuple[int, int, bytes]) -> SharedBytes:
        """The memory that another process of this machine and user holds under this address.

        Raises:
            InputError: it is not there.
        """
        pid, number, token = address
        try:
            found = _of_descriptor(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the shared memory of process {pid} can't be opened from process {os.getpid()} "
                f"({error}): the ranks of a machine must see each other's processes."
            ) from error
        if found.address[2] != token:
            raise InputError(
                f"process {pid} of this machine holds other memory: its ranks were started where "
                "they do not see each other's processes."
            )
        return found

    @property
    def address(self) -> tuple[int, int, bytes]:
        """An argument for `at`, of use while this process lives."""
        return os.getpid(), self._fd, self._memory[:TOKEN]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process and no other thread is in such a block of the same memory.

        The system frees the lock of a process that was killed. Where this object is collected
        together with a generator that needs it still, only threads are kept out: the file is closed
        already, and its number may be another's.
        """
        assert fcntl is not None  # else there is no such memory
        with self._threads:
            is_open = bool(self._open)
            if is_open:
                fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)
            try:
                yield
            finally:
                if is_open:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)

    def _take(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self.bytes: Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)[TOKEN:]
        self._fd, self._threads = fd, threading.Lock()
        self._open = [fd]
        weakref.finalize(self, _close, self._open)

    def __reduce__(self) -> Any:
        return _of_duplicate, (reduction.DupFd(self._fd),)


def _close(opened: list[int]) -> None:
    os.close(opened.pop())


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lbaccel")
    fd, path = tempfile.mkstemp(prefix="lbaccel")
    Path(path).unlink()
    return fd


def _of_descriptor(fd: int) -> SharedBytes:
    found = SharedBytes.__new__(SharedBytes)
    try:
        found._take(fd)
    except BaseException:
        os.close(fd)
        raise
    return found


def _of_duplicate(duplicate: Any) -> SharedBytes:
    return _of_descriptor(duplicate.detach())
