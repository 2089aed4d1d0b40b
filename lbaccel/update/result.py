"""The result of one update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lbaccel.update.accumulation import Stop


@dataclass(frozen=True)
class UpdateResult:
    """The result of one update, the same on every rank."""

    applied: bool  # False: an fp16 overflow (nothing was written), or `dropped`
    loss: float  # weighted mean over all samples of the update
    grad_norm: float  # of the whole gradient, before clipping; nan if dropped
    num_samples: int  # over all ranks
    num_updates: int  # so far, dropped ones among them
    samples_seen: int  # in those updates, over all ranks
    micro_batch_size: int  # that it was done with
    num_retries: int  # attempts before it for which memory did not suffice
    stop: Stop | None = None  # some rank called `request_stop`; all see it at the same update
    dropped: bool = False  # by `drops`: counted, statistics moved, no weight written
    sums: Mapping[str, float] = field(
        default_factory=dict
    )  # of the loss function, over all samples
