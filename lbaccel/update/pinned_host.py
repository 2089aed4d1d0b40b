"""Where activations lie between forward and backward: pinned memory of the host.

Both copies go through the current stream. They take their time there, and for that the device's
memory is free as soon as the stream is past the copy, no other stream has to be waited for, and
nothing waits on the host. The pinned buffers are used again in the stream's own order, so the host
holds those of one micro-step, however far it runs ahead of the device.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Of a storage. There and back over PCIe 4 x16, 1 MiB takes 84 us, as long as four kernels need to
# be launched with their hooks: less is not worth its place on the host.
LEAST_BYTES = 2**20


class Store(Protocol):
    """Where activations lie between forward and backward."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether the storage of `tensor` can lie here."""
        ...

    def put(self, flat: Tensor) -> Any:
        """Keep the values of a whole storage [elements]; what comes back is handed to `get`."""
        ...

    def get(self, kept: Any, dtype: torch.dtype) -> Tensor:
        """A new tensor [elements] on the device, with those values."""
        ...

    def release(self, kept: Any) -> None:
        """`kept` is not asked for again."""
        ...


class Buffers:
    """Buffers that are used again: the smallest free one that is large enough, or a new one.

    Args:
        make: number of bytes -> a new buffer.

    >>> buffers = Buffers(bytearray)
    >>> size, buffer = buffers.take(1000)
    >>> buffers.give(size, buffer)
    >>> buffers.take(900)[1] is buffer, buffers.num_bytes
    (True, 1024)
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make
        self._free: list[tuple[int, Any]] = []
        self.num_bytes = 0  # of all that were made

    def take(self, num_bytes: int) -> tuple[int, Any]:
        """A buffer of at least so many bytes, and its size."""
        at = bisect_left(self._free, num_bytes, key=itemgetter(0))
        if at < len(self._free):
            return self._free.pop(at)
        size = pinned_bytes(num_bytes)
        buffer = self._make(size)
        self.num_bytes += size
        return size, buffer

    def give(self, size: int, buffer: Any) -> None:
        """Take a buffer back."""
        insort(self._free, (size, buffer), key=itemgetter(0))


def pinned_bytes(num_bytes: int) -> int:
    """Bytes that torch's host allocator pins for so many: the next power of two.

    >>> pinned_bytes(1024), pinned_bytes(1025)
    (1024, 2048)
    """
    return 1 << max(0, num_bytes - 1).bit_length()


class PinnedHost:
    """Pinned memory of the host, for what lies on a CUDA device."""

    def __init__(self) -> None:
        self._of_stream: dict[Any, Buffers] = defaultdict(lambda: Buffers(_pinned))

    def __reduce__(self) -> Any:  # a copy of a model has buffers of its own
        return type(self), ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the host that are pinned."""
        return sum(buffers.num_bytes for buffers in self._of_stream.values())

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is a plain tensor of a CUDA device, and large enough."""
        return tensor.is_cuda and is_plain(tensor) and is_worth(tensor)

    def put(self, flat: Tensor) -> Any:
        """See `Store`; a lack of host memory is torch's error, which starts the recovery."""
        buffers = self._of_stream[torch.cuda.current_stream(flat.device)]
        size, buffer = buffers.take(flat.nbytes)
        buffer[: flat.nbytes].view(flat.dtype).copy_(flat, non_blocking=True)
        return buffers, size, buffer, flat.nbytes, flat.device

    def get(self, kept: Any, dtype: torch.dtype) -> Tensor:
        """See `Store`."""
        _, _, buffer, num_bytes, device = kept
        return buffer[:num_bytes].view(dtype).to(device, non_blocking=True)

    def release(self, kept: Any) -> None:
        """See `Store`: whoever writes into the buffer next comes later in its stream."""
        buffers, size, buffer, *_ = kept
        buffers.give(size, buffer)


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def is_plain(tensor: Tensor) -> bool:
    """Whether strides and offset into a storage say all of it: no subclass, no sparse one."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


def is_worth(tensor: Tensor) -> bool:
    """Whether its storage has `LEAST_BYTES`."""
    return tensor.untyped_storage().nbytes() >= LEAST_BYTES
