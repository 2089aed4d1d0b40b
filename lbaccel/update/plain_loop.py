"""Sentences for lines of a plain loop that are left over around `LargeBatch.update`.

An update steps the optimizer, moves the scheduler and accumulates by itself. The same line in the
user's loop would move a schedule twice as fast, or write weights that belong to no update.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from lbaccel.data.as_data_loader import LOOP
from lbaccel.data.loader import Update
from lbaccel.errors import InputError, kind_of
from lbaccel.optim.scheduler import updates_counted
from lbaccel.update.compiled import warn_of_compiled

_WATCHES: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


def check_prepared(loader: Any, scheduler: Any) -> None:
    """Stop at a loader that yields no updates, and at a scheduler that an update can't move.

    Raises:
        InputError: either of them.
    """
    if isinstance(loader, DataLoader):
        raise InputError(
            f"prepare() got a {type(loader).__name__}, whose batches are no updates. Use "
            "UpdateLoader(dataset, plan) in its place, with num_workers and collate_fn as there."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InputError(
            "prepare() got a ReduceLROnPlateau, whose step() needs a validation loss that an "
            "update does not have. Leave it out of prepare(), and call scheduler.step(loss) after "
            "each validation, with the same loss on every rank."
        )
    if isinstance(scheduler, AcceleratedScheduler):
        raise InputError(
            "prepare() got a scheduler that accelerator.prepare() has wrapped, which would move "
            "once a process in each update. Give the scheduler itself, not prepared."
        )
    step = getattr(scheduler, "step", None)
    if scheduler is None or (callable(step) and _runs_without_arguments(step)):
        return
    raise InputError(
        f"prepare() got a {type(scheduler).__name__}, whose step() an update can't call without "
        "arguments. Leave it out of prepare() and step it yourself, or use "
        "lr_scheduler(optimizer, schedule, samples_per_update=...)."
    )


def _runs_without_arguments(step: Any) -> bool:
    try:
        inspect.signature(step).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin that shows no signature
        return True
    return True


def check_update(update: Any) -> None:
    """Stop at a batch in the place of an update.

    Raises:
        InputError: it is no `Update`.
    """
    if not isinstance(update, Update):
        raise InputError(
            f"update() got {kind_of(update)}, and takes an item of an UpdateLoader. {LOOP}."
        )


class LoopGuard:
    """Notices what the user's loop does that the update does by itself.

    Args:
        accelerator: its count of `accumulate` is read.
        optimizer: the user's own; a step from outside of an update is refused.
        scheduler: the one that updates move, or None.
        model: as the loss function gets it.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: Any, scheduler: Any, *, model: nn.Module
    ) -> None:
        self._accelerator, self._scheduler = accelerator, scheduler
        self._uncompiled: nn.Module | None = model  # until the first update
        self._stepping = False
        self._moved: int | None = None  # by our own steps, as the scheduler counts them
        self._accumulated = accelerator.step
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, Optimizer):
            if (before := _WATCHES.pop(optimizer, None)) is not None:
                before.remove()  # the LargeBatch that prepared it last steps it
            # Weakly: an optimizer outlives its LargeBatch, and then it is the user's again.
            own = weakref.ref(self)
            _WATCHES[optimizer] = optimizer.register_step_pre_hook(
                lambda stepped, *_: _refuse_step(own(), stepped)
            )

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, the optimizer's step is the update's."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def before_update(self, update: Any) -> None:
        """Stop where something was moved since the update before.

        Raises:
            InputError: `update` is no update, the scheduler was stepped, or `accumulate` is around.
        """
        check_update(update)
        if self._uncompiled is not None:
            warn_of_compiled(self._uncompiled)
            self._uncompiled = None
        if self._accelerator.step != self._accumulated or not self._accelerator.sync_gradients:
            self._accumulated = self._accelerator.step
            raise InputError(
                "accelerator.accumulate(model) is around update(), which accumulates by itself and "
                "steps in each call. Take update() out of it: for update in loader: "
                "result = large_batch.update(update, loss_fn)."
            )
        count = updates_counted(self._scheduler)
        if count is not None and self._moved is not None and count > self._moved:
            more, self._moved = count - self._moved, None
            raise InputError(
                f"scheduler.step() was called {'once' if more == 1 else f'{more} times'} since the "
                "last update, and update() moves the scheduler that prepare() got: the learning "
                "rate would run ahead. Delete that line, or leave the scheduler out of prepare() "
                "and step it yourself."
            )

    def after_update(self) -> None:
        """Note where the scheduler stands."""
        self._moved = updates_counted(self._scheduler)

    def forget(self) -> None:
        """A state was loaded: counts may stand anywhere."""
        self._moved, self._accumulated = None, self._accelerator.step


def _refuse_step(guard: LoopGuard | None, optimizer: Optimizer) -> None:
    if guard is None or guard._stepping:
        return
    if not any(float(group["lr"]) for group in optimizer.param_groups):
        return  # how torch's get_optimizer_state_dict makes the state of a new optimizer
    raise InputError(
        "optimizer.step() was called outside of an update, and update() steps the optimizer that "
        "prepare() got. Delete that line, with the backward pass and zero_grad() that belong to "
        "it; for a loss of its own use an optimizer that prepare() did not get."
    )
