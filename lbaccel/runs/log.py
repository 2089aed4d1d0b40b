"""The state of a run between updates: means to be logged, the best result, its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lbaccel.batch.stream import UpdateStream
from lbaccel.runs.length import Length
from lbaccel.runs.notices import LossNotices
from lbaccel.runs.progress import peak_gib


class RunLog:
    """Turns updates and evaluations into lines of metrics, at the cadence asked for.

    All of it is in `state_dict`, so that a resumed run writes the lines that an unbroken one would.

    Args:
        stream: where updates lie.
        log_every: updates a line; the loss is the mean over its samples.
        eval_every: epochs between evaluations, exact to the sample.
        length: its `stop_at` is the last update, which is always logged and evaluated.
        notices: what there is to say about the loss.
    """

    def __init__(
        self,
        stream: UpdateStream,
        *,
        log_every: int,
        eval_every: float,
        length: Length,
        notices: LossNotices,
    ) -> None:
        self.stream, self.log_every, self.length = stream, log_every, length
        self.eval_samples = Fraction(str(eval_every)) * stream.samples_per_epoch
        self.notices = notices
        self.window: list[tuple[float, int]] = []
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.evaluation_due = False  # that of the newest update failed: a resume does it first
        self.training_seconds = 0.0
        self.window_seconds = 0.0
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the whole run, without the time between its end and a resume."""
        return self._seconds_before + time.perf_counter() - self._started

    def where(self, result: Any) -> dict[str, float]:
        """The values that every line of the log begins with."""
        return {
            "update": result.num_updates,
            "samples_seen": result.samples_seen,
            "epoch": result.samples_seen / self.stream.samples_per_epoch,
            "perf/seconds": self.seconds,
        }

    def after_update(
        self,
        result: Any,
        *,
        lr: float,
        seconds: float,
        more: Callable[[], Mapping[str, float]] = dict,
    ) -> dict[str, float] | None:
        """Take a counted update in; the metrics of a line, `more` among them, where one is due."""
        self.training_seconds += seconds
        self.window_seconds += seconds
        self.window.append((result.loss, result.num_samples))
        if result.num_updates % self.log_every and result.num_updates != self.length.stop_at:
            return None
        weight = sum(n for _, n in self.window)
        metrics = {
            "train/loss": sum(loss * n for loss, n in self.window) / weight,
            "optim/lr": lr,
            **({} if result.dropped else {"optim/grad_norm": result.grad_norm}),
            "batch/global": result.num_samples,
            "batch/micro": result.micro_batch_size,
            "perf/samples_per_second": weight / max(self.window_seconds, 1e-9),
            "perf/samples_per_second_mean": result.samples_seen / self.training_seconds,
            "memory/peak_gib": peak_gib(),
            **more(),
        }
        self.window, self.window_seconds = [], 0.0
        self.latest |= metrics
        return metrics

    def evaluates(self, result: Any) -> bool:
        """Whether an evaluation is due: an end of `eval_every` epochs lies in this update."""
        before = (result.samples_seen - result.num_samples) // self.eval_samples
        return result.samples_seen // self.eval_samples > before or (
            result.num_updates == self.length.stop_at
        )

    def after_evaluation(self, result: Any, metrics: dict[str, float]) -> bool:
        """Take the metrics of an evaluation in; whether its top-1 is the best so far."""
        self.latest |= metrics
        self.evaluation_due = False
        improved = metrics["val/top1"] > self.best.get("val/top1", -math.inf)
        if improved:
            self.best = {"update": result.num_updates, **metrics}
        return improved

    def summary(self, large_batch: Any) -> dict[str, Any]:
        """The content of `summary.json` besides the status."""
        kept = {k.replace("/", "_"): v for k, v in self.latest.items() if k[:4] in ("val/", "trai")}
        return {
            "num_updates": large_batch.num_updates,
            "samples_seen": large_batch.samples_seen,
            "seconds": self.seconds,
            "peak_gib": peak_gib(),
            "samples_per_second": large_batch.samples_seen / max(self.training_seconds, 1e-9),
            "best_val_top1": self.best.get("val/top1"),
            "best_update": self.best.get("update"),
            **kept,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "window": [list(pair) for pair in self.window],
            "best": dict(self.best),
            "latest": dict(self.latest),
            "evaluation_due": self.evaluation_due,
            "training_seconds": self.training_seconds,
            "window_seconds": self.window_seconds,
            "seconds": self.seconds,
            "notices": self.notices.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.window = [(float(loss), int(n)) for loss, n in state["window"]]
        self.best, self.latest = dict(state["best"]), dict(state["latest"])
        self.evaluation_due = bool(state.get("evaluation_due", False))  # none before 0.2
        self.training_seconds = float(state["training_seconds"])
        self.window_seconds = float(state.get("window_seconds", 0.0))  # none before 0.2
        self._seconds_before = float(state["seconds"])
        if "notices" in state:  # none before 0.2
            self.notices.load_state_dict(state["notices"])
        self._started = time.perf_counter()
