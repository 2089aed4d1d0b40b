"""A torch scheduler out of a schedule in samples."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lbaccel.errors import check_number
from lbaccel.schedules import Schedule


def lr_scheduler(
    optimizer: Optimizer, schedule: Schedule, *, samples_per_update: int | Callable[[int], int]
) -> LambdaLR:
    """A torch scheduler with `lr = initial_lr * schedule(samples before update u)`, group by group.

    Build the optimizer at the peak learning rate (head and layer-decay groups at their multiple of
    it). Step once after each optimizer update, and leave it out of `accelerator.prepare`, which
    would step it once a process. To resume, build both and then load both states: torch sets the
    learning rate when the scheduler is built, not when its state is loaded.

    Args:
        optimizer: any torch optimizer.
        schedule: samples seen to multiplier, such as of `make_schedule`.
        samples_per_update: `global_batch_size`, or a function from update u (0, 1, ...) to its
            number of samples, for short last updates and growing batches.

    Raises:
        InputError: a number of samples that is not positive.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    >>> scheduler = lr_scheduler(optimizer, lambda s: 0.5 if s < 64 else 1.0, samples_per_update=32)
    >>> rates = []
    >>> for _ in range(3):
    ...     rates.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.2, 0.2, 0.4]
    """
    if not callable(samples_per_update):
        check_number("samples_per_update", samples_per_update)
    before = [0]  # samples before update 0, 1, ...: a cache, not state, so resuming refills it

    def multiplier(update: int) -> float:
        if not callable(samples_per_update):
            return schedule(update * samples_per_update)
        while len(before) <= update:
            size = samples_per_update(len(before) - 1)
            check_number("samples_per_update", size)
            before.append(before[-1] + size)
        return schedule(before[update])

    return LambdaLR(optimizer, multiplier)
