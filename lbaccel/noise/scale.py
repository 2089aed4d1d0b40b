"""The gradient noise scale of a run, averaged over its updates.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1; `unit_norms` takes the norms of each
micro-batch's gradient, and `arithmetic.estimate` has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lbaccel.errors import check_whole
from lbaccel.noise.arithmetic import RatioAverage, estimate, same_epoch
from lbaccel.noise.unit_norms import UnitSums


class NoiseScale:
    """The critical batch size S / |G|^2 of a run, averaged over its updates; for `LargeBatch`.

    S = tr(Sigma) of one sample's gradient and |G|^2 are estimated in each update, without bias, and
    averaged apart (see `RatioAverage` for weights and interval). An update of a single micro-batch
    gives no estimate, and `reason` says so; one that was dropped or skipped counts nothing.

    Args:
        half_life_samples: samples after which an update's weight in the averages has halved; a
            tenth of the run is a good choice.
        training_set_size: N, where samples are drawn by epochs without replacement; None where
            they are drawn independently.
        samples_per_epoch: that an epoch consumes, where it is not N (`last_update="drop"`).
        preconditioned: beside it tr(P Sigma) / G^T P G with P = 1 / (sqrt(v) + eps), v being the
            second moment of an optimizer of Adam's family before the update.

    Raises:
        InputError: a size below one.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from lbaccel import BatchPlan, LargeBatch, UpdateLoader
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    >>> data = [(x, x.sum(0, keepdim=True)) for x in torch.randn(400, 2)]
    >>> plan = BatchPlan(global_batch_size=40, micro_batch_size=10)
    >>> noise = NoiseScale(half_life_samples=4000, training_set_size=400)
    >>> large_batch = LargeBatch(Accelerator(cpu=True), plan, noise_scale=noise)
    >>> model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    >>> def loss_fn(model, micro_batch):
    ...     x, y = micro_batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> for update in loader:
    ...     result = large_batch.update(update, loss_fn)
    >>> round(noise.average.num_updates), noise.average.ratio > 0
    (10, True)
    """

    def __init__(
        self,
        *,
        half_life_samples: float,
        training_set_size: int | None = None,
        samples_per_epoch: int | None = None,
        preconditioned: bool = False,
    ) -> None:
        if training_set_size is not None:
            check_whole("training_set_size", training_set_size)
        self._epoch = samples_per_epoch or training_set_size
        if self._epoch is not None:
            check_whole("samples_per_epoch", self._epoch)
        self._set_size = math.inf if training_set_size is None else training_set_size
        self.average = RatioAverage(half_life_samples)
        self.preconditioned = RatioAverage(half_life_samples) if preconditioned else None
        self.reason = "no update was done yet."

    def add(
        self, units: UnitSums, *, grad_norm: float, num_samples: int, weight: float, start: int
    ) -> None:
        """Take a written update in; `LargeBatch` calls it.

        Args:
            units: of all ranks.
            grad_norm: |g|, before clipping.
            num_samples: B.
            weight: W, the sum of the micro-batches' weights (B without weights of their own).
            start: samples consumed before it.
        """
        if units.num_units < 2:
            self.reason = (
                f"the last update was one micro-batch of {num_samples} samples, and the spread of "
                f"gradients needs two. Use micro_batch_size <= {max(1, num_samples // 2)}."
            )
            return
        self.reason = ""
        repeat = 1.0
        if self._epoch is not None:
            repeat = same_epoch(start, num_samples, samples_per_epoch=self._epoch)
        size = {
            "num_samples": num_samples,
            "num_units": units.num_units,
            "training_set_size": self._set_size,
            "repeat": repeat,
        }
        factor, update_sq = num_samples**3 / weight, grad_norm**2
        self.average.add(
            estimate(factor * units.sum_sq, update_sq, **size), num_samples=num_samples
        )
        if self.preconditioned is not None and math.isfinite(units.preconditioned_sq):
            found = estimate(
                factor * units.preconditioned_sq, units.preconditioned_share * update_sq, **size
            )
            self.preconditioned.add(found, num_samples=num_samples)

    def metrics(self) -> dict[str, float]:
        """The line of a log; empty before the first estimate. An unbounded figure is infinite."""
        if not self.average.num_updates:
            return {}
        interval = self.average.interval()
        found = {
            "noise/critical_batch_size": self.average.ratio,
            "noise/low": interval.low,
            "noise/high": interval.high,
            "noise/scale_s": self.average.scale_s,
            "noise/grad_norm_sq": self.average.grad_norm_sq,
            "noise/num_updates": self.average.num_updates,
        }
        if self.preconditioned is not None and self.preconditioned.num_updates:
            interval = self.preconditioned.interval()
            found |= {
                "noise/preconditioned_batch_size": self.preconditioned.ratio,
                "noise/preconditioned_low": interval.low,
                "noise/preconditioned_high": interval.high,
            }
        return found

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers."""
        state = {"average": self.average.state_dict()}
        if self.preconditioned is not None:
            state["preconditioned"] = self.preconditioned.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from a saved state; what it does not hold starts anew."""
        self.average.load_state_dict(state["average"])
        if self.preconditioned is not None and "preconditioned" in state:
            self.preconditioned.load_state_dict(state["preconditioned"])
