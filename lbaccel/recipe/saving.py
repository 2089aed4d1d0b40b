"""A checkpoint is written a second time where memory ran out in the first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbaccel.errors import RunFailed
from lbaccel.recipe.unforeseen import first_line
from lbaccel.update.memory.oom import is_out_of_memory, let_go


def twice_at_most(device: torch.device) -> Callable[[Callable[[], object]], None]:
    """A function that calls `write`, and once more where memory ran out and was given back.

    Raises:
        RunFailed: memory ran out again.
    """

    def writes(write: Callable[[], object]) -> None:
        for last in (False, True):
            try:
                write()
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if last:
                    raise RunFailed(
                        "memory ran out twice while a checkpoint was written "
                        f"({first_line(error)}). Use a smaller --micro-batch-size, or give the "
                        "run more --memory."
                    ) from error
                let_go(error, device)

    return writes
