"""The plan of a run as memory makes it: smaller micro-batches after a lack, larger ones later."""

from __future__ import annotations

import logging
from dataclasses import replace

from lbaccel.batch.plan import BatchPlan
from lbaccel.update.memory.micro_batch import MicroBatchSize

logger = logging.getLogger("lbaccel")

THRASHING = 2  # updates in a row in which the allocator emptied its cache


class AdaptivePlan:
    """A `BatchPlan` whose micro-batch follows the memory; the global batch never moves.

    Each method says in words what it changed, or returns None where it changed nothing.

    >>> adaptive = AdaptivePlan(BatchPlan(global_batch_size=512, micro_batch_size=64))
    >>> adaptive.shrink(update=3, num_samples=512)
    'out of memory in update 3 at micro-batch 64: done again with 32. The global batch stays 512.'
    >>> adaptive.plan.micro_batch_size
    32
    """

    def __init__(self, plan: BatchPlan) -> None:
        self.ask(plan)

    def ask(self, plan: BatchPlan) -> None:
        """Take a plan as the one to come back to."""
        self.plan = plan
        self._size = MicroBatchSize(asked=plan.micro_batch_size, unit=plan.group_size)
        self._num_short = 0

    def shrink(self, *, update: int, num_samples: int) -> str | None:
        """The next smaller micro-batch after memory ran out; None where one group is all."""
        before = self.plan.micro_batch_size
        smaller = self._size.shrink(used=self.plan.largest_micro_batch(num_samples))
        if smaller is None:
            return None
        self._set(smaller)
        return (
            f"out of memory in update {update} at micro-batch {before}: done again with "
            f"{smaller}. The global batch stays {num_samples}."
        )

    def after_update(self, *, short_of_memory: bool) -> str | None:
        """Grow again after a shrink that is long ago; shrink where the allocator thrashes."""
        before = self.plan.micro_batch_size
        size = self._size.after_update()
        self._num_short = self._num_short + 1 if short_of_memory else 0
        if self._num_short >= THRASHING:
            smaller, self._num_short = self._size.shrink(), 0
            if smaller is None:
                return None
            self._set(smaller)
            return (
                f"the allocator emptied its cache in {THRASHING} updates in a row, which is "
                f"slow and near the limit: micro-batch {before} is {smaller} from here on."
            )
        if size == before:
            return None
        self._set(size)
        return f"micro-batch {size} again, after updates at {before} that went well."

    def _set(self, size: int) -> None:
        self.plan = replace(self.plan, micro_batch_size=size)


def announce(text: str | None, *, speak: bool) -> None:
    """Log what an `AdaptivePlan` changed, where it did and this rank is to `speak`."""
    if text is not None and speak:
        logger.warning(text)


def what_to_try(plan: BatchPlan) -> str:
    """The advice for a micro-batch of one group that does not fit."""
    unit = plan.group_size
    groups = {1: "one sample", 2: "one pair of samples"}.get(unit, f"one group of {unit} samples")
    advice = ["apply_activation_checkpointing(model) (--activation-checkpointing full)"]
    if isinstance(plan.norm_batch_size, int):
        groups = f"one ghost batch of {unit} samples"
        advice.append(
            f"a smaller norm_batch_size than {unit}, which changes what BatchNorm sees, or "
            "'frozen' where the weights are pretrained"
        )
    advice.append("bf16, smaller images, or a smaller model")
    return f"{groups} in a micro-batch is all there is. Try {'; or '.join(advice)}."
