"""A value of a metric whose first reaching a run notes (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lbaccel.runs.compare import first_reaching

_KEPT = "val/"  # what an evaluation measures; a resume may ask for a target in any of it


class EvaluationAt(NamedTuple):
    """One metric of an evaluation, and when that was."""

    update: float
    samples: float
    seconds: float | None
    value: float


@dataclass
class TargetWatch:
    """Knows the first evaluation that reached a value.

    A loss reaches it from above, any other metric from below; nan never does. All evaluations are
    kept, with a target or without one: a resume may bring another, which an evaluation of before
    may have reached.

    Attributes:
        value: None where there is no target.
        metric: the metric.
        seen: all evaluations so far, by metric.

    >>> watch = TargetWatch(70.0)
    >>> watch.after_evaluation({"update": 9, "samples_seen": 90}, {"val/top1": 71.5})
    >>> watch.summary()
    {'target': 70.0, 'target_update': 9, 'target_samples': 90, 'target_seconds': None}
    """

    value: float | None = None
    metric: str = "val/top1"
    seen: dict[str, list[EvaluationAt]] = field(default_factory=dict)

    @property
    def line(self) -> dict[str, float]:
        """A constant beside each evaluation, which trackers draw as a line."""
        return {} if self.value is None else {self.metric.replace("val/", "target/"): self.value}

    @property
    def reached(self) -> EvaluationAt | None:
        """The first evaluation that reached the target; None before that."""
        if self.value is None:
            return None
        return first_reaching(self.seen.get(self.metric, ()), self.metric, target=self.value)

    def after_evaluation(self, where: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Take an evaluation in; `where` has its update, samples_seen and perf/seconds."""
        at = (where["update"], where["samples_seen"], where.get("perf/seconds"))
        for name, value in metrics.items():
            if name.startswith(_KEPT):
                self.seen.setdefault(name, []).append(EvaluationAt(*at, value))

    def summary(self) -> dict[str, float | None]:
        """Entries of summary.json; None before it was reached."""
        if self.value is None:
            return {}
        found = self.reached
        update, samples, seconds = (None, None, None) if found is None else found[:3]
        return {
            "target": self.value,
            "target_update": update,
            "target_samples": samples,
            "target_seconds": seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"seen": {name: [list(one) for one in of] for name, of in self.seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, towards this target."""
        self.seen = {name: [EvaluationAt(*one) for one in of] for name, of in state["seen"].items()}
