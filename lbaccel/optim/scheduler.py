"""Torch's scheduler out of a schedule in samples, and one that follows AdaScale's gain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lbaccel.errors import check_number
from lbaccel.optim.adascale import AdaScale, Averages
from lbaccel.optim.schedules import Schedule


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


def refresh(scheduler: Any) -> None:
    """Set the rates of the next update anew, where what the schedule knows has changed."""
    if isinstance(scheduler, AdaScaleLR):
        scheduler.refresh()
        return
    groups = scheduler.optimizer.param_groups
    for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * schedule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def after_update(scheduler: Any, *, dropped: bool) -> None:
    """Move a scheduler by an update that was counted.

    A schedule in updates or samples moves whatever became of the update. AdaScale's time counts
    what updates gained, and an update that was dropped gained nothing.

    Args:
        scheduler: torch's, or any with `step()`, or `AdaScaleLR`.
        dropped: no weight was written.
    """
    if dropped and isinstance(scheduler, AdaScaleLR):
        scheduler.pass_over()
    else:
        scheduler.step()


def updates_counted(scheduler: Any) -> int | None:
    """How often a scheduler has moved, by its own count; None where it has none.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    >>> updates_counted(lr_scheduler(optimizer, lambda s: 1.0, samples_per_update=32))
    0
    """
    name = "num_updates" if isinstance(scheduler, AdaScaleLR) else "last_epoch"
    count = getattr(scheduler, name, None)
    return count if isinstance(count, int) else None


class AdaScaleLR:
    """Learning rates by AdaScale: `lr = initial_lr * gain * schedule(t B0)`, group by group.

    t, the schedule's time, counts updates of the base batch: each update adds its gain. The gain of
    an update comes from the averages after the one before it. `LargeBatch` steps it once an update
    that wrote weights; one that was dropped is passed over, and leaves t as it was.

    Args:
        optimizer: at the learning rate of the base batch.
        schedule: multiplier by samples of the base batch's run, such as of `make_schedule`.
        rule: the gain, and the time t.
        averages: of S and |G|^2, such as `NoiseScale.average`.
        sizes: samples of update u (0, 1, ...).
        total_samples: of the base batch's run; `finished` from there on.

    Source: Johnson et al. 2020 (arXiv 2007.05105), algorithm 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        rule: AdaScale,
        averages: Averages,
        sizes: Callable[[int], int],
        total_samples: float,
    ) -> None:
        self.optimizer, self.schedule, self.rule = optimizer, schedule, rule
        self.averages, self.sizes, self.total_samples = averages, sizes, total_samples
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.num_updates = 0
        self.gain = 1.0
        self._measure()

    @property
    def finished(self) -> bool:
        """Whether the updates so far stand for the whole run of the base batch."""
        return self.rule.progress * self.rule.base_batch_size >= self.total_samples

    @property
    def most_updates(self) -> int:
        """Updates of the whole run, where each that is left gains no more than one of the base."""
        left = self.total_samples / self.rule.base_batch_size - self.rule.progress
        return self.num_updates + max(0, ceil(left))

    def _measure(self) -> None:
        self.gain = self.rule.gain(self.averages, self.sizes(self.num_updates))
        self.refresh()

    def refresh(self) -> None:
        """Set the rates of the next update."""
        factor = self.gain * self.schedule(self.rule.progress * self.rule.base_batch_size)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def get_last_lr(self) -> list[float]:
        """The rates of the next update."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self) -> None:
        """An update was written: its gain counts, and the next one is measured."""
        self.rule.advance(self.gain)
        self.num_updates += 1
        self._measure()

    def pass_over(self) -> None:
        """An update was dropped: its samples are gone, and it stood for no update of the base."""
        self.num_updates += 1
        self._measure()

    def metrics(self) -> dict[str, float]:
        """The gain of the next update, and the updates of the base batch so far."""
        return {"adascale/gain": self.gain, "adascale/base_updates": self.rule.progress}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"num_updates": self.num_updates, "gain": self.gain, **self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.num_updates, self.gain = int(state["num_updates"]), float(state["gain"])
        self.rule.load_state_dict(state)
        self.refresh()
