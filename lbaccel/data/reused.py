"""Memory of large tensors that is used again as soon as nobody holds the tensor."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST = 2  # blocks: the batch that the caller has still, and the one that is made


class ReusedMemory:
    """float32 tensors in blocks of memory, of which each belongs to one living tensor at most.

    A batch in new memory costs a page fault for every 4 KiB, which takes longer than to fill it. A
    block is free when the tensor that was in it, all of its views and all that autograd keeps of it
    are gone: they share one storage, which holds the array that this class has a weak reference to.
    Where no block is free the tensor has memory of its own, as from `torch.empty`. A block that is
    too small for what is asked for, or more than twice as large, is given up.

    >>> memory = ReusedMemory()
    >>> first = memory.empty((2, 3))
    >>> view, place = first[1:], first.data_ptr()
    >>> del first
    >>> memory.empty((2, 3)).data_ptr() == place  # the view lives
    False
    >>> del view
    >>> memory.empty((2, 3)).data_ptr() == place
    True
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[NDArray[Any], weakref.ref[Any]]] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor of this shape whose numbers are any."""
        length = math.prod(shape)
        with self._lock:
            fit = [pair for pair in self._blocks if length <= len(pair[0]) <= 2 * length]
            free = next((pair for pair in fit if pair[1]() is None), None)
            if free is None and len(fit) == _MOST:
                self._blocks = fit
                return torch.empty(shape)
            # by torch, as its alignment may decide which kernel sums in which order
            block = torch.empty(length).numpy() if free is None else free[0]
            array = block[:length]
            kept = [pair for pair in fit if pair is not free]
            self._blocks = [*kept, (block, weakref.ref(array))]
            return torch.from_numpy(array).view(shape)

    def __reduce__(self) -> Any:
        return ReusedMemory, ()
