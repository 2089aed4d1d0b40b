"""Kernels that a piece of code launches, counted at the dispatcher: no clock, no device."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

# Allocations, and the token of a mask, which the host draws and reads from its own memory.
NO_KERNEL = ("empty", "new_empty", "detach", "lift_fresh", "alias", "random_", "_local_scalar")


class Launches(TorchDispatchMode):
    """Counts the operators that work on elements: no view, no allocation, no token."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if not func.is_view and not name.startswith((*NO_KERNEL, "profiler::")):
            self.count += 1
        return func(*args, **(kwargs or {}))
