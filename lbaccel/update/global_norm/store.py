"""Values of the micro-batches between passes, in the memory of the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Key = tuple[int, int]  # number of the micro-batch, value


def gradient_of(key: Key) -> Key:
    """The key of a value's gradient."""
    return key[0], -1 - key[1]


class HostStore:
    """Keeps tensors on the host, pinned where they come from another device.

    Copies run in the order of the device's stream: no host synchronisation. On a CPU a tensor is
    kept as it is.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self.num_bytes = 0  # held now
        self.peak = 0  # most ever held

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def put(self, key: Key, x: Tensor) -> None:
        """Keep `x` in the place of what was there."""
        self.drop([key])
        x = x.detach()
        if x.device.type != "cpu":
            x = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        self._held[key] = x
        self.num_bytes += x.nbytes
        self.peak = max(self.peak, self.num_bytes)

    def get(self, key: Key, device: torch.device) -> Tensor:
        """It, on the device."""
        return self._held[key].to(device, non_blocking=True)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget these, where they are there."""
        for key in keys:
            x = self._held.pop(key, None)
            if x is not None:
                self.num_bytes -= x.nbytes
