"""What the launcher (torchrun, accelerate) told this process: the one place that reads it."""

from __future__ import annotations

import os


def rank() -> int:
    """This process among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """Processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
