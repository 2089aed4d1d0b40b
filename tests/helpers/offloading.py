"""A store of activations on any device, which counts what it does."""

from __future__ import annotations

import torch

from lbaccel.update.pinned_host import Buffers, is_plain, is_worth


class CopyStore:
    """Copies beside the original; `room` is how many bytes of them there may be."""

    def __init__(self, room=None):
        self.room = room
        self.buffers = Buffers(lambda size: torch.empty(size, dtype=torch.uint8))
        self.buffers_after = []
        self.num_puts = self.num_gets = self.live = self.most = 0
        self.sizes, self.elements = [], []

    def __reduce__(self):
        return CopyStore, (self.room,)

    def takes(self, tensor):
        return is_plain(tensor) and is_worth(tensor)

    def put(self, flat):
        if self.room is not None and self.live + flat.nbytes > self.room:
            raise MemoryError(f"{flat.nbytes} bytes more than the room")
        size, buffer = self.buffers.take(flat.nbytes)
        buffer[: flat.nbytes].view(flat.dtype).copy_(flat)
        self.num_puts += 1
        self.live += flat.nbytes
        self.most = max(self.most, self.live)
        self.sizes.append(flat.nbytes)
        self.elements.append(flat.numel())
        return size, buffer, flat.nbytes

    def get(self, kept, dtype):
        self.num_gets += 1
        _, buffer, num_bytes = kept
        return buffer[:num_bytes].view(dtype).clone()

    def release(self, kept):
        size, buffer, num_bytes = kept
        self.live -= num_bytes
        buffer.fill_(255)  # nobody reads it any more
        self.buffers.give(size, buffer)
