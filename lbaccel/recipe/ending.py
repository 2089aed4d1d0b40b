"""How a command that may run on several ranks ends: its last line, its exit code, its processes."""

from __future__ import annotations

import sys

from lbaccel.errors import RankFailed
from lbaccel.launch import rank


def fail(error: object, code: int) -> int:
    """Print the message on the first rank, as the last line, and return the exit code."""
    sys.stdout.flush()
    if rank() == 0 or isinstance(error, RankFailed):
        name = {2: "error", 1: "run failed"}.get(code)
        print(f"{name}: {error}" if name else str(error), file=sys.stderr, flush=True)
    return code


def end_process_group() -> None:
    """Leave the process group, if one was joined."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
