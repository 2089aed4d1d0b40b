"""A value of a metric whose first reaching a run notes (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lbaccel.runs.compare import lower_is_better


@dataclass
class TargetWatch:
    """Notes the first evaluation that reaches a value.

    A loss reaches it from above, any other metric from below; nan never does.

    Attributes:
        value: None where there is no target.
        metric: the metric.
        reached: update, samples and seconds of that evaluation; empty before.

    >>> watch = TargetWatch(70.0)
    >>> watch.after_evaluation({"update": 9, "samples_seen": 90}, {"val/top1": 71.5})
    >>> watch.summary()
    {'target': 70.0, 'target_update': 9, 'target_samples': 90, 'target_seconds': None}
    """

    value: float | None = None
    metric: str = "val/top1"
    reached: dict[str, float | None] = field(default_factory=dict)

    @property
    def line(self) -> dict[str, float]:
        """A constant beside each evaluation, which trackers draw as a line."""
        return {} if self.value is None else {self.metric.replace("val/", "target/"): self.value}

    def after_evaluation(self, where: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Take an evaluation in; `where` has its update, samples_seen and perf/seconds."""
        if self.value is None or self.reached or self.metric not in metrics:
            return
        sign = -1 if lower_is_better(self.metric) else 1
        if sign * (metrics[self.metric] - self.value) >= 0:
            self.reached = {
                "update": where["update"],
                "samples": where["samples_seen"],
                "seconds": where.get("perf/seconds"),
            }

    def summary(self) -> dict[str, float | None]:
        """Entries of summary.json; None before it was reached."""
        if self.value is None:
            return {}
        names = ("update", "samples", "seconds")
        return {
            "target": self.value,
            **{f"target_{name}": self.reached.get(name) for name in names},
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "metric": self.metric, "reached": dict(self.reached)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; with another target it starts afresh."""
        if (state["value"], state["metric"]) == (self.value, self.metric):
            self.reached = dict(state["reached"])
