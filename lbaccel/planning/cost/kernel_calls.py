"""One call of a kernel on tensors like those of a plan, and torch's memory events of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.profiler
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lbaccel.planning.cost.kept_kernels import kept_kernels
from lbaccel.planning.cost.processor import kernel_state
from lbaccel.update.memory.budget import default_budget

NEEDED = 4  # times the tensors of a call must be free


class Form(NamedTuple):
    """Of a tensor, what a kernel's allocations depend on."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def build(self, make: Callable[..., Tensor]) -> Tensor:
        """Such a tensor, by `torch.empty` or another that takes a number of elements."""
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        flat = make(last + 1, dtype=self.dtype, device="cpu")
        return flat.as_strided(self.sizes, self.strides)


class Unmeasured(Exception):
    """A kernel that can't be called here."""


def resized(t: Tensor, sizes: dict[int, int]) -> Form:
    """`t` with other sizes, in the same layout: a stride grows with the dimensions inside it."""
    strides = list(t.stride())
    for dim, size in sizes.items():
        for i, stride in enumerate(t.stride()):
            is_outside = (-stride, i) < (-t.stride(dim), dim)
            if i != dim and t.stride(dim) > 0 and is_outside:
                strides[i] = strides[i] * size // t.shape[dim]
    return Form(tuple(sizes.get(i, n) for i, n in enumerate(t.shape)), tuple(strides), t.dtype)


def backend(x: Form, how: Sequence[Any]) -> Any:
    """ATen's implementation of a convolution of `x`.

    Args:
        x: the input.
        how: weight, stride, padding, dilation, transposed, output_padding, groups.

    Raises:
        Unmeasured: ATen does not say.
    """
    return _known_backend(x, tuple(_plain(a) for a in how), kernel_state())


@lru_cache(maxsize=4096)
def _known_backend(x: Form, how: tuple[Any, ...], state: Any) -> Any:
    with _called():
        weight, *rest = how
        rest = [list(a) if isinstance(a, tuple) else a for a in rest]
        tensors = x.build(torch.empty), weight.build(torch.empty)
        return torch._C._select_conv_backend(*tensors, None, *rest, None)


def kernel_allocations(op: Any, args: tuple[Any, ...]) -> Sequence[int]:
    """Allocations (+, and - where freed) of a call of `op`, in order; each is made once.

    `kept_kernels` has those of earlier processes.

    Raises:
        Unmeasured: the call fails, has no memory, or a profiler runs already.
    """
    return _known_allocations(op, tuple(_plain(a) for a in args), kernel_state())


@lru_cache(maxsize=4096)
def _known_allocations(op: Any, args: tuple[Any, ...], state: Any) -> tuple[int, ...]:
    kept, call = kept_kernels(), (str(op), args, state)
    found = kept.get(call)
    if found is None:
        found = _measured_allocations(op, args)
        kept.put(call, found)
    return found


def _measured_allocations(op: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    taken = sum(math.prod(a.sizes) * a.dtype.itemsize for a in args if isinstance(a, Form))
    free = default_budget(torch.device("cpu"))
    if NEEDED * taken > free:
        raise Unmeasured(f"a call on {taken / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free")
    with _called():
        ready = [_ready(a) for a in args]
        return tuple(allocations(lambda: op(*ready)))


@contextmanager
def _called() -> Iterator[None]:
    """Around a real call in a trace; whatever goes wrong makes the kernel `Unmeasured`."""
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            yield
        except Exception as error:
            raise Unmeasured(str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Form(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def _ready(value: Any) -> Any:
    if isinstance(value, Form):
        return value.build(torch.zeros)  # on numbers that are denormal a kernel is slow
    return list(value) if isinstance(value, tuple) else value


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that torch's CPU allocator gave (+) and took back (-) in this thread, in order.

    What the call returns is still there at the end. torch's older profiler sees it: the newer one
    takes a second to start, and writes to the process's error stream.
    """
    state = torch.autograd.ProfilerState.CPU
    off = False
    torch.autograd._enable_profiler_legacy(
        torch.autograd.ProfilerConfig(
            state, off, True, off, off, off, torch.profiler._ExperimentalConfig()
        )
    )
    result = None
    try:
        result = call()
    finally:
        records = torch.autograd._disable_profiler_legacy()
    del result
    return [
        event.cpu_memory_usage()
        for thread in records
        for event in thread
        if event.kind() == "memory_alloc"
    ]
