"""A run on disk: its folder opened, its checkpoints written and read again, its end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from lbaccel.errors import CannotRead, ForeignState, InputError, RunFailed, reading
from lbaccel.models import load_exactly, read_tensors
from lbaccel.optim.scheduler import refresh
from lbaccel.runs.abandoned import put_aside
from lbaccel.runs.checkpoints import (
    check_checkpoint,
    latest_good,
    read_state,
    save_checkpoint,
)
from lbaccel.runs.environment import versions, write_env
from lbaccel.runs.figures import plot_run
from lbaccel.runs.folder import (
    BEST,
    BEST_EMA,
    CHECKPOINTS,
    METRICS,
    MODEL,
    MODEL_EMA,
    RESUMES,
    STATE,
    SUMMARY,
    atomic_write_text,
    checkpoints_in,
    follow_link,
    new_run_folder,
    run_of,
    weights_file,
    write_config,
    write_summary,
)
from lbaccel.runs.lock import writing
from lbaccel.runs.metric_lines import read_lines
from lbaccel.runs.ranks import decided
from lbaccel.runs.tracking import keep_updates_until
from lbaccel.runs.wandb_tracker import summarize
from lbaccel.text import printable

Say = Callable[[str], object]
SINCE: dict[str, str] = {}
"""Parts that a checkpoint of an earlier version may lack: name to the version that brought it."""


class Session:
    """The parts of a run, which are saved and restored together.

    Args:
        accelerator: the main process writes, all processes read.
        model: unwrapped.
        whole: gives the model with all its weights, as `LargeBatch.whole_model` does; a collective.
        parts: name to object with `state_dict` and `load_state_dict`: optimizer, scheduler,
            counters, loader, log, and the scaler where there is one.
        ema: an average of the weights with a `module`, or None.
        writes: calls what writes a checkpoint; where memory runs out in it, it may call it again.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        whole: Callable[[], AbstractContextManager[Any]],
        parts: Mapping[str, Any],
        *,
        ema: Any = None,
        writes: Callable[[Callable[[], object]], object] = lambda write: write(),
    ) -> None:
        self._writes = writes
        self.accelerator, self.model, self.parts, self.ema = accelerator, model, dict(parts), ema
        self.whole = whole
        self.folder: Path | None = None
        self.contract: Mapping[str, Any] | None = None  # goes into each checkpoint

    def weights(self, whole: Any) -> dict[str, Any]:
        """File stem to state_dict."""
        weights = {MODEL: whole.state_dict()}
        if self.ema is not None:
            weights[MODEL_EMA] = self.ema.module.state_dict()
        return weights

    def save(self, *, update: int, best: Collection[str], keep: int, **described: Any) -> None:
        """Write a checkpoint from the main process; the others wait, and hear where it fails.

        Args:
            update: that it is of.
            best: the links that name it from now on, of `best` and `best-ema`.
            keep: newest checkpoints that stay.
            described: further arguments of `save_checkpoint`.

        Raises:
            RunFailed: it could not be written; on every rank.
        """
        if self.folder is None:
            return
        # on every rank: a sharded optimizer gathers its state
        state = {name: part.state_dict() for name, part in self.parts.items()}
        folder = self.folder / CHECKPOINTS
        with self.whole() as whole:

            def write() -> None:
                save_checkpoint(
                    folder,
                    update=update,
                    weights=self.weights(whole),
                    state=state,
                    contract=self.contract,
                    best=BEST in best,
                    best_ema=BEST_EMA in best,
                    keep=keep,
                    **described,
                )

            decided(self.accelerator, lambda: self._writes(write))

    def restore(self, path: Path, *, say: Say) -> int:
        """Take the state of a checkpoint, of which `load_weights` took the weights; its update.

        A part that came with a later version than the checkpoint's keeps its fresh state, and a
        line names it.

        Raises:
            InputError: it was saved at another precision, or a part of it does not fit; the text
                names the part and the file.
        """
        state = read_state(path)
        absent = self.parts.keys() - state.keys()
        required = {name for name in absent if name not in SINCE}
        if required or state.keys() - self.parts.keys():
            raise InputError(
                f"{path} holds the state of {sorted(state)}, this run has {sorted(self.parts)}: "
                "it was saved at another precision, or with another lbaccel."
            )
        for name in sorted(absent):
            say(f"resume: {path} is older than lbaccel {SINCE[name]}: {name} starts afresh")
        for name in state:
            _restore(name, self.parts[name], state[name], path / STATE)
        refresh(self.parts["scheduler"])  # an extension may have changed its schedule
        update = self.parts["counters"].num_updates
        self.folder = run_of(path)
        say(f"resume: {path} (update {update})")
        return update

    def open(
        self, output: Path, *, name: str, seed: int, config: Mapping[str, Any], locks: ExitStack
    ) -> Path:
        """Make the run folder, or put aside what lies past where the run goes on; a collective.

        Args:
            output: folder of run folders.
            name: of a new run folder, behind the time.
            seed: written beside the environment.
            config: what config.yaml holds.
            locks: is given the lock of the new folder; `find_checkpoint` took that of an old one.

        Returns:
            The run folder, the same on every rank.
        """
        resumed = self.folder

        def made() -> Path:
            if resumed is not None:
                self._go_on(resumed, config)
                return resumed
            folder = new_run_folder(output, name)
            locks.enter_context(writing(folder, say=self.accelerator.print))
            write_config(folder, config)
            write_env(folder, seed=seed)
            return folder

        self.folder = decided(self.accelerator, made)
        return self.folder

    def _go_on(self, folder: Path, config: Mapping[str, Any]) -> None:
        update = self.parts["counters"].num_updates
        log, say = self.parts.get("log"), self.accelerator.print
        best, best_ema = (getattr(log, name, {}).get("update") for name in ("best", "best_ema"))
        put_aside(folder, update, best=best, best_ema=best_ema, say=say)
        for fault in (*keep_updates_until(folder, update), *self._missing_end(folder, update)):
            self.accelerator.print(f"resume: {folder / METRICS}: {fault}")
        write_config(folder, config)
        line = {
            "update": update,
            "world_size": self.accelerator.num_processes,
            "plan": config["plan"]["equation"],
            "epochs": config["epochs"],
            "command": sys.argv,
            "versions": versions(),
        }
        _add_line(folder / RESUMES, json.dumps(line))

    def _missing_end(self, folder: Path, update: int) -> list[str]:
        """A sentence where the lines end before what the checkpoint says was logged."""
        window = getattr(self.parts.get("log"), "window", None)
        if window is None or not (folder / METRICS).exists():
            return []
        logged = update - len(window)
        lines = read_lines(folder / METRICS)
        last = max((x.row["update"] for x in lines if x.row and "train/loss" in x.row), default=0)
        if last >= logged:
            return []
        return [f"lines of update {last + 1} to {logged} are missing at its end"]

    def close(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Write the summary, to wandb too, end the trackers and, after a good end, draw the plots.

        A plot that can't be drawn is a note: the run has all else that it was started for.
        """
        if self.folder is None:
            return
        try:
            if self.accelerator.is_main_process:
                write_summary(self.folder, summary)
        finally:
            summarize(self.accelerator, summary)
            self.accelerator.end_training()
        if self.accelerator.is_main_process and not failed and (self.folder / METRICS).exists():
            try:
                plot_run(self.folder)
            except Exception as error:  # of matplotlib, of the disk, or of memory
                reason = f"{type(error).__name__}: {error}"
                self.accelerator.print(
                    f"note: the plots were not drawn ({reason}). The run is whole without them; "
                    f"lbaccel compare {os.fspath(self.folder)} --plot FILE draws its curves."
                )

    def was_closed(self) -> bool:
        """Whether the run came to its end before, summary and plots included."""
        if self.folder is None:
            return False
        try:
            summary = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        done = self.parts["counters"].num_updates
        if not isinstance(summary, dict):
            return False
        return summary.get("status") == "done" and summary.get("num_updates") == done

    def how_to_go_on(self) -> str:
        """The line to type after a run that ended before its time."""
        if self.folder is None:
            return "Nothing was written."
        newest = next(iter(checkpoints_in(self.folder / CHECKPOINTS)), None)
        if newest is None:
            return "No checkpoint was written."
        resume = f"lbaccel train --resume {os.fspath(self.folder)}"
        return f"{newest.name} is kept. To go on: {resume}"


def _restore(name: str, part: Any, state: Any, file: Path) -> None:
    try:
        part.load_state_dict(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as e:
        in_words = isinstance(e, (InputError, RunFailed, torch.OutOfMemoryError))
        if in_words and not isinstance(e, ForeignState):
            raise
        reason = printable(" ".join(str(e).split())[:200]) or type(e).__name__
        raise InputError(
            f"{file} holds a state of {name!r} that does not fit this run ({type(e).__name__}: "
            f"{reason}): it was changed, or is of another run. Resume from another checkpoint."
        ) from e


def load_weights(path: Path, model: Any, *, ema: Any = None) -> None:
    """Take the weights of a checkpoint that `find_checkpoint` gave, before the model is sharded.

    Raises:
        InputError: they do not fit the model.
    """
    for stem, owner in ((MODEL, model), (MODEL_EMA, ema and ema.module)):
        if owner is not None:
            file = path / weights_file(stem)
            load_exactly(owner, read_tensors(file), "the model", file)


def _add_line(path: Path, line: str) -> None:
    with reading(path):
        earlier = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    atomic_write_text(path, f"{earlier}{line}\n")


def find_checkpoint(
    accelerator: Any, target: str | None, *, auto: bool, say: Say, locks: ExitStack
) -> Path | None:
    """The checkpoint to go on from, the same on every rank: the one given, or a run's newest good.

    Args:
        accelerator: the main process reads the checksums and tells the others.
        target: a run folder or a checkpoint; None is a new run.
        auto: nobody named the run, so that a new one starts where none of its checkpoints is good.
        say: is told which checkpoints were refused, and why.
        locks: is given the lock of the run on the main process, before anything of it is read.

    Raises:
        InputError: no checkpoint can be used.
        RunFailed: another process writes into the run.
    """
    if target is None:
        return None

    def choose() -> Path:
        run = run_of(Path(target))
        instead = ", or start a new run without --resume"
        locks.enter_context(writing(run, say=say, instead=instead))
        return _choose(Path(target), say)

    try:
        return decided(accelerator, choose)
    except InputError as error:
        if not auto or isinstance(error, CannotRead):  # what is unreadable may be whole
            raise
        say(f"{error} A new one starts.")
        return None


def _choose(target: Path, say: Say) -> Path:
    run, target = run_of(target), follow_link(target)
    if target != run:
        check_checkpoint(target)
        return target
    path = latest_good(run / CHECKPOINTS, say)
    if path is None:
        raise InputError(
            f"--resume {target}: no checkpoint in {run / CHECKPOINTS} can be used. "
            "Start a new run without --resume."
        )
    return path
