"""Which of the tensors that the user's code holds is which value of a tape."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from lbaccel.update.global_norm.tape import Meta, Value


class Handles:
    """The tensors of a forward that is recorded, as long as the user's code holds them."""

    def __init__(self) -> None:
        self._values: dict[int, int] = {}  # id of a tensor: its value
        self._alive: dict[int, Any] = {}
        self._on: dict[int, set[int]] = {}  # address of a memory: ids of the tensors that lie there
        self._stale: set[int] = set()  # ids of tensors whose memory another one's write changed

    def __contains__(self, x: Tensor) -> bool:
        return id(x) in self._values

    def encoded(self, x: Any) -> Any:
        """`x`, or the value that it is."""
        value = self._values.get(id(x)) if isinstance(x, Tensor) else None
        return x if value is None else Value(value)

    def name(self, x: Tensor, value: int) -> None:
        """`x` is this value from here on."""
        key, memory = id(x), memory_of(x)
        self._values[key] = value
        self._stale.discard(key)
        if key in self._alive:
            return
        there = self._on.setdefault(memory, set())
        there.add(key)

        def forget(_: Any) -> None:
            for held in (self._values, self._alive):
                held.pop(key, None)
            there.discard(key)
            self._stale.discard(key)

        self._alive[key] = weakref.ref(x, forget)

    def overwritten(self, x: Tensor) -> None:
        """A write into `x` changed the other tensors on its memory."""
        self._stale |= self._on.get(memory_of(x), set()) - {id(x)}

    def is_stale(self, x: Any) -> bool:
        """Whether the memory of `x` was written through another tensor."""
        return id(x) in self._stale

    def lie_at(self, memory: int) -> bool:
        """Whether a value lies at this address."""
        return bool(self._on.get(memory))


def stand_in(meta: Meta) -> Tensor:
    """A tensor of this shape that takes no memory; its values are nan, or true."""
    fill = math.nan if meta.dtype.is_floating_point or meta.dtype.is_complex else 1
    return torch.full((), fill, dtype=meta.dtype, device=meta.device).expand(meta.shape)


def memory_of(x: Tensor) -> int:
    """Of two tensors on one memory, the same number."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)
