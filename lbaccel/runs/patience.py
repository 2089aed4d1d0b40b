"""An early end: after so many evaluations that did not improve a metric (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Patience:
    """Counts evaluations since a metric was best; all ranks have its value, so all agree.

    A loss is better where it is smaller, any other metric where it is larger; nan is never better.

    Attributes:
        most: evaluations without improvement that end the run; None never ends it.
        monitor: the metric.
        best: its best value so far.
        waited: evaluations since then.

    >>> patience = Patience(2, "val/loss")
    >>> [patience.after_evaluation({"val/loss": loss}) for loss in (1.0, 0.5, 0.7, 0.5)]
    [False, False, False, True]
    """

    most: int | None = None
    monitor: str = "val/top1"
    best: float | None = None
    waited: int = 0

    def after_evaluation(self, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation in; whether the run ends here."""
        value = metrics.get(self.monitor, math.nan)
        sign = -1 if "loss" in self.monitor else 1
        better = not math.isnan(value) and (self.best is None or sign * (value - self.best) > 0)
        if better:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it waited as long as it may."""
        return self.most is not None and self.waited >= self.most

    def __str__(self) -> str:
        many = "an evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        best = "no value" if self.best is None else f"{self.best:.6g}"
        return f"stopped early: {many} without a better {self.monitor} than {best}"

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"monitor": self.monitor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; of another metric it starts afresh."""
        if state["monitor"] == self.monitor:
            self.best = None if state["best"] is None else float(state["best"])
            self.waited = int(state["waited"])
