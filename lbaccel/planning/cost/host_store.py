"""Stores of activations on tensors without memory: one that looks on, and one that moves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lbaccel.planning.cost.trace import Recorder
from lbaccel.update.pinned_host import Buffers, is_worth


class LookingOn:
    """Notes what autograd saves in the blocks that are handed to it, and moves nothing.

    Small tensors are noted too: a larger micro-batch than the traced one may send them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def takes(self, tensor: Tensor) -> bool:
        """No; noted."""
        trace = self._recorder.trace
        trace.saved.append((len(trace.events), self._recorder.watch(tensor)))
        return False

    def put(self, flat: Tensor) -> Any:
        """Nothing is put here."""
        raise AssertionError("it takes nothing")

    def get(self, kept: Any, dtype: torch.dtype) -> Tensor:
        """Nothing is here to be got."""
        raise AssertionError("it took nothing")

    def release(self, kept: Any) -> None:
        """Nothing is here."""


class TracedHost:
    """Records the copies to the host and back, the device's new tensors, and the host's bytes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._buffers = Buffers(lambda num_bytes: None)

    def takes(self, tensor: Tensor) -> bool:
        """Whether `PinnedHost` would take it of a device."""
        return isinstance(tensor, FakeTensor) and is_worth(tensor)

    def put(self, flat: Tensor) -> Any:
        """A copy to the host."""
        buffer = self._buffers.take(flat.nbytes)
        self._recorder.host_copy(flat.nbytes)
        self._recorder.trace.host_bytes = self._buffers.num_bytes
        return buffer, flat.numel(), flat.nbytes

    def get(self, kept: Any, dtype: torch.dtype) -> Tensor:
        """A new tensor, and the copy into it."""
        _, count, num_bytes = kept
        back = torch.empty(count, dtype=dtype)
        self._recorder.host_copy(num_bytes)
        return back

    def release(self, kept: Any) -> None:
        """The buffer is free."""
        self._buffers.give(*kept[0])


__all__ = ["LookingOn", "TracedHost"]
