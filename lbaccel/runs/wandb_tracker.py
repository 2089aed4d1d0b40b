"""wandb as a mirror of a run: metrics on our own counters, and a summary that they leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker, on_main_process

from lbaccel.runs.folder import plain
from lbaccel.runs.wandb_login import has_wandb_key

_GROUPS = ("best_", "val_", "train_")
# 255 is what wandb's own hook gives a run that Ctrl-C ended; a run that was stopped is finished
_EXIT_CODES = {"failed": 1, "interrupted": 255}


class WandB(WandBTracker):
    """wandb on our own counters: its step would drop what a resumed run logs a second time."""

    _exit_code: int | None = None

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add a line to the history."""
        super().log(values, step=None, **kwargs)

    @on_main_process
    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set entries of the summary; a `status` among them decides the state that wandb shows.

        wandb copies the last value of each metric into the summary under the metric's own name, and
        would write `define_metric(summary="max")` afresh at each resume: no entry here has the name
        of a metric that has another value.
        """
        self.run.summary.update(plain(values, finite=True))
        if "status" in values:
            self._exit_code = _EXIT_CODES.get(values["status"])

    @on_main_process
    def finish(self) -> None:
        """Close the run, as finished or as failed."""
        self.run.finish(exit_code=self._exit_code)


def summarize(accelerator: Any, values: Mapping[str, Any]) -> None:
    """Tell the trackers that have a summary, which is wandb alone, what summary.json says.

    Where that fails, a note says so, and the run goes on: its folder has it all the same.

    Args:
        accelerator: with its trackers; only those of the main process are asked.
        values: entries under the names of summary.json; wandb has them under `metric_name`.
    """
    for tracker in accelerator.trackers:
        if isinstance(tracker, WandB):
            try:
                tracker.summarize({metric_name(key): value for key, value in values.items()})
            except Exception as error:  # of the network, or of wandb's own process
                reason = f"{type(error).__name__}: {error}"
                accelerator.print(f"note: the summary of wandb was not written ({reason})")


def metric_name(key: str) -> str:
    """The name in wandb of an entry of summary.json: as the metric that it is a value of.

    >>> [metric_name(key) for key in ("val_top1_ema", "best_val_top1", "best_update", "peak_gib")]
    ['val/top1_ema', 'best/val/top1', 'best/update', 'peak_gib']
    """
    for group in _GROUPS:
        if key.startswith(group):
            return f"{group[:-1]}/{metric_name(key.removeprefix(group))}"
    return key


def arguments_of_init(run: Path, mode: str) -> dict[str, Any]:
    """Arguments of `wandb.init`: quiet, inside the run folder, under the id of an earlier start."""
    import wandb

    earlier = sorted(
        (run / "wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime
    )
    # Asked to go online without a key that we know of, wandb must be able to ask for one.
    silent = mode == "offline" or has_wandb_key()
    return {
        "mode": mode,
        "dir": str(run.absolute()),  # the process that writes may have another working folder
        "id": earlier[-1].stem.removeprefix("run-") if earlier else None,
        "resume": "allow" if earlier else None,
        "reinit": "finish_previous",
        "settings": wandb.Settings(silent=silent, console="off"),
    }
