"""A recipe right before its first update, for what measures it and trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import InputError
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.checks import checked
from lbaccel.recipe.optimizer import build_optimizer, takes_fused_step
from lbaccel.recipe.options import Settings
from lbaccel.recipe.rate import lines_of, rate_of
from lbaccel.recipe.sizes import limit_for
from lbaccel.recipe.task import build_task, find_micro_batch, large_batch_of
from lbaccel.update.accumulation import LossFn
from lbaccel.update.engine import LargeBatch

Say = Callable[[str], object]


@dataclass(frozen=True)
class Built:
    """A recipe right before its first update: fresh weights, or those of `checkpoint`."""

    large_batch: LargeBatch
    loader: UpdateLoader
    optimizer: Any
    loss_fn: LossFn
    base_lr: float
    lr: float  # peak, of the global batch: `base_lr` scaled

    @property
    def largest_lr(self) -> float:
        """The peak rate of the group with the highest, such as a head at 10 times the rate."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


@contextmanager
def built(settings: Settings, *, say: Say) -> Iterator[Built]:
    """The parts that `lbaccel train` would train with; inside, its memory limit holds.

    Args:
        settings: of the recipe.
        say: prints a line.

    Raises:
        InputError: settings that can't be used, or `resume`.
    """
    s = checked(settings)
    if s.run.resume is not None:
        raise InputError(
            f"--resume {s.run.resume}: this starts from fresh weights, or from a file: "
            "--checkpoint runs/NAME/checkpoints/last/model.safetensors."
        )
    accelerator, precision = make_accelerator(s.batch.precision)
    task = build_task(s, accelerator, precision, say=say)
    rate = rate_of(s, global_batch_size=task.plan.global_batch_size)
    for line in lines_of(s.rate, rate):
        say(line)
    fused = takes_fused_step(s.optimizer, accelerator, precision)
    optimizer = build_optimizer(s.optimizer, task.model, rate=rate, fused=fused, say=say)
    task.model.to(accelerator.device)
    large_batch = large_batch_of(s, accelerator, task)
    _, optimizer, loader = large_batch.prepare(task.model, optimizer, task.loader)
    with limit_for(s.batch, accelerator.device) as line:
        if line:
            say(line)
        find_micro_batch(task, large_batch, loader, say=say)
        yield Built(large_batch, loader, optimizer, task.loss_fn, rate.base_lr, rate.lr)
