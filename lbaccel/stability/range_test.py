"""The learning-rate range test at the global batch asked for, leaving everything as it was.

Smith 2017, arXiv 1506.01186, section 3.3: the rate rises update by update while the loss is
watched. Here it rises in equal factors, from `min_lr` to `max_lr`:

    eta_u = min_lr (max_lr / min_lr)^(u / (U - 2)),    u = 0 .. U - 2

and the loss of update u + 1, which the step at eta_u led to, is what eta_u is judged by; the last
of the U updates only measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lbaccel.data.loader import Update, UpdateLoader
from lbaccel.errors import Diverged, InputError, check_number, check_whole
from lbaccel.stability.rehearsal import group_ratios, rehearsal
from lbaccel.update.accumulation import LossFn
from lbaccel.update.engine import LargeBatch

NUM_UPDATES = 30
DIVERGED = 4.0  # times the best smoothed loss
SMOOTHING = 0.5  # weight of the past: a large batch's loss has little noise, and few updates
SAFE = 4.0
NOISE = 3.0  # standard deviations of one loss; the lowest of 30 without a course lies 1.2 below
MOST_SHORT = 4  # losses from which a noise can be told
MOST_SKIPPED = 30  # fp16's scaler halves its scale at each overflow
AfterUpdate = Callable[[int, float, float], object]


@dataclass(frozen=True)
class LrRange:
    """The measurements of a range test; the same on every rank.

    `losses[u]` and `smoothed[u]` were measured after the step at `lrs[u]`; `start_loss` before any.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    start_loss: float
    ended: str  # "max_lr", "diverged" or "not finite"
    diverged_at: float | None  # the rate at which it ended, else None
    global_batch_size: int

    @property
    def largest_lr(self) -> float | None:
        """Where the smoothed loss was lowest: the largest rate at which it still came down."""
        if not self.smoothed or min(self.smoothed) >= self.start_loss:
            return None
        return self.lrs[self.smoothed.index(min(self.smoothed))]

    @property
    def steepest_lr(self) -> float | None:
        """Where the smoothed loss fell most in one update, and so per factor of the rate.

        Up to `largest_lr`: a loss that has gone up may fall back by more than training ever takes.
        """
        if self.largest_lr is None:
            return None
        before = (self.start_loss, *self.smoothed)
        falls = [b - a for a, b in zip(self.smoothed, before, strict=False)]
        falls = falls[: self.lrs.index(self.largest_lr) + 1]
        return self.lrs[falls.index(max(falls))]

    @property
    def fall(self) -> float:
        """By how much the smoothed loss came down: start minus the lowest, at least 0."""
        return max(0.0, self.start_loss - min(self.smoothed, default=self.start_loss))

    @property
    def noise(self) -> float:
        """The standard deviation of a single loss about its course.

        sigma = median |l_(u-1) - 2 l_u + l_(u+1)| / (0.6745 sqrt(6)), over the start and the
        updates up to the lowest smoothed loss, at least half of them. A straight course has second
        differences of 0.
        """
        if not self.smoothed:
            return 0.0
        end = max(self.smoothed.index(min(self.smoothed)) + 1, len(self.losses) // 2)
        losses = (self.start_loss, *self.losses[:end])
        if len(losses) < MOST_SHORT:
            return 0.0
        three = zip(losses, losses[1:], losses[2:], strict=False)
        bends = [abs(a - 2 * b + c) for a, b, c in three]
        return median(bends) / (0.6745 * 6**0.5)

    @property
    def is_noise(self) -> bool:
        """Whether noise alone may have made the loss fall so far: no rate can be read off it."""
        return 0.0 < self.fall <= NOISE * self.noise

    @property
    def safe_lr(self) -> float | None:
        """`largest_lr` / 4: in so few updates an instability has hardly begun to grow."""
        return None if self.largest_lr is None else self.largest_lr / SAFE

    @property
    def suggested_lr(self) -> float | None:
        """The lower of `steepest_lr` and `safe_lr`; None where the fall is within the noise."""
        if self.steepest_lr is None or self.safe_lr is None or self.is_noise:
            return None
        return min(self.steepest_lr, self.safe_lr)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the suggestions."""
        names = ("steepest_lr", "largest_lr", "safe_lr", "suggested_lr", "fall", "noise")
        return asdict(self) | {name: getattr(self, name) for name in names}


def ramp(min_lr: float, max_lr: float, count: int) -> list[float]:
    """`count` rates in equal factors, both ends among them.

    >>> [round(lr, 6) for lr in ramp(0.001, 1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    """
    return [min_lr * (max_lr / min_lr) ** (i / (count - 1)) for i in range(count)]


def lr_find(
    large_batch: LargeBatch,
    loader: UpdateLoader,
    loss_fn: LossFn,
    *,
    min_lr: float,
    max_lr: float,
    num_updates: int = NUM_UPDATES,
    after_update: AfterUpdate | None = None,
) -> LrRange:
    """Range test by real updates of the whole global batch, all of which are taken back.

    Weights, buffers, optimizer, scheduler, average, counters, loader and random states are as
    before, also where the loss diverges, `loss_fn` raises or Ctrl-C comes. Parameter groups keep
    the ratios of their rates; a rate here is that of the largest. The test ends early where the
    loss is above 4 times its best smoothed value (best + 3 |best|), or not finite.

    Args:
        large_batch: prepared, in one process or under DDP.
        loader: what `prepare` returned; its next update stays the next one.
        loss_fn: as for `LargeBatch.update`.
        min_lr, max_lr: first and last rate.
        num_updates: of `global_batch_size` samples each; the last one only measures.
        after_update: called with (updates done, loss, the rate of the next step) after each.

    Raises:
        InputError: rates or updates of no use, ZeRO or FSDP2.
        RunFailed: the loss is not finite before the first step, or another rank failed.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from lbaccel import BatchPlan, LargeBatch, UpdateLoader
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = [(torch.ones(1), torch.zeros(1)) for _ in range(8)]
    >>> plan = BatchPlan(global_batch_size=4, micro_batch_size=2)
    >>> large_batch = LargeBatch(Accelerator(cpu=True), plan)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    >>> def loss_fn(model, micro_batch):
    ...     return torch.nn.functional.mse_loss(model(micro_batch[0]), micro_batch[1])
    >>> found = lr_find(large_batch, loader, loss_fn, min_lr=0.01, max_lr=10.0, num_updates=9)
    >>> found.ended, large_batch.num_updates, optimizer.param_groups[0]["lr"]
    ('diverged', 0, 0.1)
    """
    check_number("min_lr", min_lr)
    check_number("max_lr", max_lr)
    check_whole("num_updates", num_updates)
    if not min_lr < max_lr:
        raise InputError(f"min_lr={min_lr:g} is not below max_lr={max_lr:g}. Use min_lr < max_lr.")
    if max_lr / min_lr == math.inf:
        raise InputError(f"min_lr={min_lr:g} and max_lr={max_lr:g} are too far apart. Use nearer.")
    if num_updates < 5:
        raise InputError(f"num_updates={num_updates}: a range of rates needs at least 5 updates.")
    lrs = ramp(min_lr, max_lr, num_updates - 1)
    losses: list[float] = []
    smoothed: list[float] = []
    ended, diverged_at = "max_lr", None
    with (
        rehearsal(large_batch, loader) as (trial, optimizer),
        closing(_endless(trial)) as updates,
    ):
        ratios = group_ratios(optimizer)
        for number, lr in enumerate([*lrs, lrs[-1]]):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = lr * ratio
            try:
                loss = _applied(large_batch, updates, loss_fn)
            except Diverged:
                if not losses:
                    raise
                ended, diverged_at = "not finite", lrs[number - 1]
                break
            losses.append(loss)
            smoothed.append(_smooth(losses))
            if after_update is not None:
                after_update(number + 1, loss, lr)
            best = min(smoothed)
            if loss > best + (DIVERGED - 1) * abs(best):
                ended, diverged_at = "diverged", lrs[number - 1]
                break
    return LrRange(
        lrs=tuple(lrs[: len(losses) - 1]),
        losses=tuple(losses[1:]),
        smoothed=tuple(smoothed[1:]),
        start_loss=losses[0],
        ended=ended,
        diverged_at=diverged_at,
        global_batch_size=large_batch.plan.global_batch_size,
    )


def _endless(loader: UpdateLoader) -> Generator[Update, None, None]:
    while True:
        yield from loader


def _applied(large_batch: LargeBatch, updates: Iterator[Update], loss_fn: LossFn) -> float:
    """The loss of the next update that is applied: fp16's first ones may overflow."""
    for _ in range(MOST_SKIPPED):
        result = large_batch.update(next(updates), loss_fn)
        if result.stop == "interrupt":
            raise KeyboardInterrupt
        if result.applied:
            return result.loss
    raise Diverged(f"{MOST_SKIPPED} updates in a row overflowed in fp16. Use bf16 or fp32.")


def _smooth(losses: Sequence[float]) -> float:
    """The exponential average of the losses, without the bias of its start.

    >>> _smooth([3.0]), _smooth([3.0, 0.0])
    (3.0, 1.0)
    """
    weights = [SMOOTHING**i for i in range(len(losses))]
    pairs = zip(weights, reversed(losses), strict=True)
    return math.fsum(w * loss for w, loss in pairs) / math.fsum(weights)
