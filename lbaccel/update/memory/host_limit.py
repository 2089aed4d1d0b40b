"""A budget of a CPU's memory, enforced between operators, where a library can't break.

`RLIMIT_DATA` alone is no budget. It counts address space: oneDNN reserves 256 KiB and more for each
kernel that it compiles, and fills a few pages of it. An allocation that it refuses inside oneDNN is
not survived (3.7 and newer, as torch ships it): the assembler keeps the error for the life of the
thread, so that every kernel compiled later "could not create a primitive", and some kernels call
what was never compiled, which is a segmentation fault. So `Watch` looks at the memory in use after
each operator and raises itself, and the system's limit stands `ROOM` above the budget.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lbaccel.batch.plan import MicroBatch

Shapes = tuple[torch.Size, ...]

ROOM = 256 * 2**20  # address space above the budget, for one operator's kernels and outputs
ENOUGH = 2  # micro-batches of a shape that went well: it is no longer checked
M_MMAP_THRESHOLD = -3  # malloc.h

_active: HostLimit | None = None


class HostLimit:
    """The private memory that this process may add to the one it uses now.

    Counted are pages in use: neither address space that was never written, nor what the C library
    keeps of freed blocks once it was asked to give it back.

    Args:
        num_bytes: the budget.
    """

    def __init__(self, num_bytes: int) -> None:
        import resource  # of Unix alone

        # A dispatch mode imports it at its first operator, which takes 80 MiB.
        importlib.import_module("torch._dynamo")
        self.num_bytes = num_bytes
        _give_back_large_blocks()
        give_back()
        self._start = _memory()[0]
        self._hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        self.went_well: Counter[Shapes] = Counter()

    def left(self) -> int:
        """Bytes of the budget that are not in use; below 0 where it was exceeded."""
        import resource

        in_use, address_space = _memory()
        left = self.num_bytes - (in_use - self._start)
        allowed = address_space + max(0, left) + ROOM
        if self._hard != resource.RLIM_INFINITY:
            allowed = min(allowed, self._hard)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, self._hard))
        return left

    def check(self) -> None:
        """Move the system's limit with the use, and refuse what is above the budget.

        Raises:
            torch.OutOfMemoryError: more than the budget is in use.
        """
        if self.left() >= 0:
            return
        give_back()
        left = self.left()
        if left < 0:
            self.went_well.clear()
            raise torch.OutOfMemoryError(
                f"{(self.num_bytes - left) / 2**20:.0f} MiB are in use above the start, and the "
                f"budget is {self.num_bytes / 2**20:.0f} MiB."
            )


class _Checks(TorchDispatchMode):
    """Checks the limit after each operator, in forward and backward alike."""

    def __init__(self, limit: HostLimit) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.limit.check()
        return out


@contextmanager
def host_limit(num_bytes: int) -> Iterator[HostLimit]:
    """Inside, `Watch` holds this process to the budget; on Linux alone."""
    import resource

    global _active
    before, outer = resource.getrlimit(resource.RLIMIT_DATA), _active
    _active = HostLimit(num_bytes)
    _active.left()
    try:
        yield _active
    finally:
        _active = outer
        resource.setrlimit(resource.RLIMIT_DATA, before)


class Watch:
    """A scope of micro-batches: those of a new shape are checked after each operator.

    A check costs some 40 microseconds, so a shape that went well `ENOUGH` times is checked no more:
    its kernels are compiled then, and it is known to fit. Nothing where no limit is active.
    """

    def __init__(self) -> None:
        self._shapes: Shapes = ()

    @property
    def is_active(self) -> bool:
        """Whether this process is inside a `host_limit`."""
        return _active is not None

    def begin(self) -> None:
        """An attempt begins: the system's limit moves to where the budget now ends."""
        if _active is not None:
            _active.left()

    def look_at(self, data: Any) -> Any:
        """Take the shapes of a micro-batch's tensors, and return it."""
        if _active is not None:
            leaves = tree_leaves(data)
            self._shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor))
        return data

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Around forward and backward of a micro-batch.

        Raises:
            torch.OutOfMemoryError: an operator ended above the budget.
        """
        limit, shapes = _active, self._shapes
        if limit is None or limit.went_well[shapes] >= ENOUGH:
            yield
            return
        with _Checks(limit):
            yield
        limit.went_well[shapes] += 1

    def always(self) -> AbstractContextManager[Any]:
        """Around work that is no micro-batch's alone: every operator is checked."""
        return nullcontext() if _active is None else _Checks(_active)

    def backward(self) -> AbstractContextManager[Any]:
        """Around its backward alone: nothing."""
        return nullcontext()

    def preview(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """Around a forward without its backward: checked, and no sign that the shape fits."""
        limit = _active
        checked = limit is not None and limit.went_well[self._shapes] < ENOUGH
        return _Checks(limit) if limit is not None and checked else nullcontext()

    def whole(self, num_samples: int, *, counts: bool) -> AbstractContextManager[Any]:
        """Around a loss on all samples: checked each time, once an update."""
        return nullcontext() if _active is None else _Checks(_active)


def left_of_budget() -> int | None:
    """Bytes of the active limit that are not in use; None where there is none."""
    return None if _active is None else _active.left()


def room_above_budget() -> int:
    """Bytes by which the system's limit stands above the budget; 0 without a budget."""
    return 0 if _active is None else ROOM


def give_back() -> None:
    """Return the C library's freed blocks to the system, where it is glibc."""
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _give_back_large_blocks() -> None:
    """Make glibc return every block of 1 MiB and more to the system when it is freed.

    By itself it keeps blocks of up to 32 MiB, cut to the sizes of an attempt that failed, and the
    next attempt finds less room than the first. Page faults make this slower; it stays so after
    the limit. Another C library is left as it is.
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def _of_the_c_library(name: str) -> Any:
    """A function of glibc, or None under another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _memory() -> tuple[int, int]:
    """Private bytes in use, and private writable address space, which RLIMIT_DATA counts."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        _, resident, shared, _, _, data, _ = os.read(file, 128).split()
    finally:
        os.close(file)
    page = os.sysconf("SC_PAGE_SIZE")
    return (int(resident) - int(shared)) * page, int(data) * page
