"""The state of a run between updates: means to be logged, the best result, its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from lbaccel.batch.stream import UpdateStream
from lbaccel.runs.folder import BEST, BEST_EMA
from lbaccel.runs.length import Length
from lbaccel.runs.notices import LossNotices
from lbaccel.runs.patience import Patience
from lbaccel.runs.progress import peak_gib, resident_gib
from lbaccel.runs.target import TargetWatch

Counted = tuple[float, int, float | None]
"""Of an update: its mean loss, its samples, and how many it had right, where that is counted."""
_BEST = {"val_top1": "val/top1", "update": "update", "epoch": "epoch"}


class RunLog:
    """Turns updates and evaluations into lines of metrics, at the cadence asked for.

    All of it is in `state_dict`, so that a resumed run writes the lines that an unbroken one would.

    Args:
        stream: where updates lie.
        log_every: updates a line; loss and top-1 are means over its samples.
        eval_every: epochs between evaluations, exact to the sample.
        length: its `stop_at` is the last update, which is always logged and evaluated.
        notices: what there is to say about the loss.
        patience: ends the run where evaluations get no better; by default never.
        target: notes when a value is reached; by default there is none.
    """

    def __init__(
        self,
        stream: UpdateStream,
        *,
        log_every: int,
        eval_every: float,
        length: Length,
        notices: LossNotices,
        patience: Patience | None = None,
        target: TargetWatch | None = None,
    ) -> None:
        self.stream, self.log_every, self.length = stream, log_every, length
        self.eval_samples = Fraction(str(eval_every)) * stream.samples_per_epoch
        self.notices, self.patience = notices, patience or Patience()
        self.target = target or TargetWatch()
        self._line: Callable[[], dict[str, float]] = dict  # of the updates since the last one
        self.window: list[Counted] = []
        self.best: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}  # the newest evaluation
        self.best_ema: dict[str, float] = {}  # of the averaged weights, by their own top-1
        self.latest: dict[str, float] = {}
        self.early = ""  # why the run ends before its length
        self.evaluation_due = False  # that of the newest update failed: a resume does it first
        self.training_seconds = 0.0
        self.window_seconds = 0.0
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self.own_gib = resident_gib()  # of the process, before the first update

    @property
    def seconds(self) -> float:
        """Of the whole run, without the time between its end and a resume."""
        return self._seconds_before + time.perf_counter() - self._started

    def where(self, result: Any) -> dict[str, float]:
        """The values that every line of the log begins with."""
        return {
            "update": result.num_updates,
            "samples_seen": result.samples_seen,
            "epoch": self._epoch(result),
            "perf/seconds": self.seconds,
        }

    def _epoch(self, result: Any) -> float:
        return result.samples_seen / self.stream.samples_per_epoch

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
        self.window.append((result.loss, result.num_samples, result.sums.get("top1")))
        self._line = partial(self._means, result, lr=lr, more=more)
        if result.num_updates % self.log_every and result.num_updates != self.length.stop_at:
            return None
        return self._line()

    def rest(self) -> dict[str, float] | None:
        """The metrics of the updates since the last line, where the run ends between two lines."""
        return self._line() or None if self.window else None

    def _means(
        self, result: Any, *, lr: float, more: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        weight = sum(n for _, n, _ in self.window)
        hits = [right for _, _, right in self.window if right is not None]
        metrics = {
            "train/loss": sum(loss * n for loss, n, _ in self.window) / weight,
            **({"train/top1": 100 * sum(hits) / weight} if len(hits) == len(self.window) else {}),
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

    def after_evaluation(self, result: Any, metrics: dict[str, float]) -> frozenset[str]:
        """Take the metrics of an evaluation in; the links that name its checkpoint from now on.

        `best` is among them where the top-1 of the weights is the best so far, and `best-ema`
        where that of their average is.
        """
        self.latest |= metrics
        self.evaluation_due = False
        self.patience.after_evaluation(metrics)
        self.target.after_evaluation(self.where(result), metrics)
        self.end_early(result.num_updates)
        self.evaluated = {"update": result.num_updates, "epoch": self._epoch(result), **metrics}
        links = set()
        if _better(metrics, self.best, "val/top1"):
            self.best = dict(self.evaluated)
            links.add(BEST)
        if _better(metrics, self.best_ema, "val/top1_ema"):
            self.best_ema = dict(self.evaluated)
            links.add(BEST_EMA)
        return frozenset(links)

    def end_early(self, num_updates: int) -> None:
        """Make this update the last one where patience is over before that."""
        if self.patience.is_over and num_updates < self.length.stop_at:
            self.length.limit(num_updates)
            self.early = str(self.patience)

    def summary(self, large_batch: Any) -> dict[str, Any]:
        """The content of `summary.json` besides the status."""
        kept = {k.replace("/", "_"): v for k, v in self.latest.items() if k[:4] in ("val/", "trai")}
        return {
            "num_updates": large_batch.num_updates,
            "samples_seen": large_batch.samples_seen,
            "seconds": self.seconds,
            "peak_gib": peak_gib(),
            "own_gib": self.own_gib,
            "samples_per_second": large_batch.samples_seen / max(self.training_seconds, 1e-9),
            **self.best_so_far(),
            **kept,
            **self.target.summary(),
        }

    def best_so_far(self) -> dict[str, float | None]:
        """The best evaluation as summary.json has it; None before the first one.

        That of the averaged weights stands beside it where there are any. A run of before 0.2 that
        was resumed does not know the epoch of a best from before.
        """
        found = {f"best_{name}": self.best.get(key) for name, key in _BEST.items()}
        if self.best_ema:
            top1, update = (self.best_ema[key] for key in ("val/top1_ema", "update"))
            found |= {"best_val_top1_ema": top1, "best_update_ema": update}
        return found

    def known_at(self, update: int, large_batch: Any) -> dict[str, float]:
        """Update, epoch and metrics of the evaluation after an update, as far as they are known."""
        kept = (self.best, self.best_ema, self.evaluated)
        known = next((one for one in kept if one.get("update") == update), {})
        if update == large_batch.num_updates:
            known = {"epoch": self._epoch(large_batch), **known}
        return {"update": update, **known}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "window": [list(counted) for counted in self.window],
            "best": dict(self.best),
            "evaluated": dict(self.evaluated),
            "best_ema": dict(self.best_ema),
            "latest": dict(self.latest),
            "evaluation_due": self.evaluation_due,
            "training_seconds": self.training_seconds,
            "window_seconds": self.window_seconds,
            "seconds": self.seconds,
            "notices": self.notices.state_dict(),
            "patience": self.patience.state_dict(),
            "target": self.target.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.window = [_counted(*entry) for entry in state["window"]]
        self.best, self.latest = dict(state["best"]), dict(state["latest"])
        self.evaluated = dict(state.get("evaluated", {}))  # none before 0.2
        # a run of before kept the checkpoint of the best weights alone, with their average
        kept = state["best"] if "val/top1_ema" in state["best"] else {}
        self.best_ema = dict(state.get("best_ema", kept))
        self.evaluation_due = bool(state.get("evaluation_due", False))  # none before 0.2
        self.training_seconds = float(state["training_seconds"])
        self.window_seconds = float(state.get("window_seconds", 0.0))  # none before 0.2
        self._seconds_before = float(state["seconds"])
        if "notices" in state:  # none before 0.2
            self.notices.load_state_dict(state["notices"])
        if "patience" in state:  # none before there was one
            self.patience.load_state_dict(state["patience"])
        if "seen" in state.get("target", {}):  # none before there was one
            self.target.load_state_dict(state["target"])
        self._started = time.perf_counter()


def _better(metrics: Mapping[str, float], best: Mapping[str, float], key: str) -> bool:
    return key in metrics and metrics[key] > best.get(key, -math.inf)


def _counted(loss: float, num_samples: int, right: float | None = None) -> Counted:
    """An update of a saved window; before `train/top1` it had two numbers."""
    return float(loss), int(num_samples), None if right is None else float(right)
