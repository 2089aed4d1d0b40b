"""Running out of memory: how each library says it, and how to let go of a failed attempt."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable

import torch

from lbaccel.update.memory.host_limit import give_back, room_above_budget

# Messages that only a lack of memory causes. Each is the text of one library, in its own case.
_CERTAIN = re.compile(
    "|".join(
        (
            r"(CUDA|HIP|XPU) out of memory\. Tried to allocate",  # torch's caching allocators
            r"(CUDA|HIP) (driver )?error: out of memory",  # the driver, through torch
            r"cuda runtime error \(2\) : out of memory",  # the same, in old extensions
            r"MPS backend out of memory",
            r"DefaultCPUAllocator: (can't allocate memory|not enough memory)",  # Linux, Windows
            r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|HIPSPARSE)_STATUS_ALLOC_FAILED\b",
            r"\bCUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED\b",
            r"\bCUFFT_ALLOC_FAILED\b",
            r"\brocblas_status_memory_error\b",
            r"\bmiopenStatusAllocFailed\b",
            r"^std::bad_alloc\b",
        )
    )
)
# Messages with other causes as well: one counts where memory is short at that moment.
_AMBIGUOUS = re.compile(
    "|".join(
        (
            r"^could not (create|execute) a (primitive|memory object)",  # oneDNN
            r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create",
            r"\bCUDNN_STATUS_NOT_INITIALIZED\b",
            # No algorithm of a convolution runs: none exists, or no workspace of one fits.
            r"\bCUDNN_STATUS_NOT_SUPPORTED\b",
            r"\b[Uu]nable to find an engine to execute this computation\b",  # torch 1.13 on
            r"\bUnable to find a valid cuDNN algorithm to run convolution\b",  # torch before
        )
    )
)
PROBE_BYTES = 256 * 2**20


def is_out_of_memory(
    error: BaseException, *, memory_is_short: Callable[[], bool] | None = None
) -> bool:
    """Whether `error` says that memory ran out, on a device or on the host; nothing else counts.

    torch's OutOfMemoryError and Python's MemoryError do; a RuntimeError by the text of the library
    that ran out: torch's allocators (CUDA, HIP, XPU, MPS, CPU), the drivers, cuBLAS, cuDNN and
    their kin, `std::bad_alloc`. A text that also has other reasons (oneDNN's "could not create a
    primitive", cuDNN's "unable to find an engine") counts where `memory_is_short`, by default:
    where 256 MiB can't be had.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("out of memory"))
    (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if _CERTAIN.search(text):
        return True
    return bool(_AMBIGUOUS.search(text)) and (memory_is_short or _memory_is_short)()


def _memory_is_short() -> bool:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.mem_get_info()[0] < PROBE_BYTES
    try:
        torch.empty(PROBE_BYTES + room_above_budget(), dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        return True
    return False


def let_go(error: BaseException | None, device: torch.device) -> None:
    """Free what a failed attempt holds: frames, autograd's queue, and what allocators keep."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    _forget_backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cpu":
        give_back()


def _forget_backward() -> None:
    """Make autograd drop what a backward pass that failed had still to do.

    This thread's queue keeps the nodes that were ready, and with them all activations below, until
    its next backward pass takes them out (torch/csrc/autograd/engine.cpp, `thread_main`).
    """
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).clone().backward()


def allocator_retries(device: torch.device) -> int:
    """How often the CUDA allocator had to empty its cache to find room; 0 elsewhere. No sync."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
