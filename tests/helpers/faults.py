"""Places in a run where something can go wrong: a hook at each, for tests and the fault campaign.

`install(phase, nth, action)` changes this process for good: call it in a forked child.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.optimizer import AcceleratedOptimizer

from lbaccel.data import loader
from lbaccel.recipe import evaluation
from lbaccel.runs import checkpoints, tracking
from lbaccel.runs import folder as run_folder
from lbaccel.runs import session as run_session
from lbaccel.update import accumulation, engine, loss_sums
from lbaccel.update.normalization import GhostNorm

Action = Callable[[], Any]


def before(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """Runs the hook before each call of `owner.name`."""

    def install(hook: Callable[[], None]) -> None:
        plain = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            hook()
            return plain(*args, **kwargs)

        setattr(owner, name, hooked)

    return install


def after(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """Runs the hook after each call of `owner.name`."""

    def install(hook: Callable[[], None]) -> None:
        plain = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            value = plain(*args, **kwargs)
            hook()
            return value

        setattr(owner, name, hooked)

    return install


def half_a_file(hook: Callable[[], None]) -> None:
    plain = safetensors.torch.save_file

    def hooked(tensors: Any, path: Any, *rest: Any) -> None:
        plain(tensors, path, *rest)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        hook()
        Path(path).write_bytes(content)

    safetensors.torch.save_file = hooked


def half_a_line(hook: Callable[[], None]) -> None:
    plain = tracking.RunFolderTracker.log

    def hooked(self: Any, values: dict[str, Any], step: Any = None, **kwargs: Any) -> None:
        text = json.dumps({"update": step, **values})
        at = self._file.tell()
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        hook()
        self._file.truncate(at)
        self._file.seek(0, 2)
        plain(self, values, step=step, **kwargs)

    tracking.RunFolderTracker.log = hooked


# phase: what installs a hook there. Each is passed at least once an update or a checkpoint.
PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before forward": before(accumulation, "accumulate"),
    "forward": before(loss_sums, "check_loss"),
    "backward": after(torch.Tensor, "backward"),
    "agreement": before(accumulation, "agree"),
    "reduce": before(accumulation, "reduce_gradients"),
    "optimizer step": before(AcceleratedOptimizer, "step"),
    "commit": before(GhostNorm, "commit"),
    "after the update": after(engine.LargeBatch, "update"),
    "metrics line": half_a_line,
    "evaluation": before(evaluation, "evaluate"),
    "checkpoint file": half_a_file,
    "manifest": before(checkpoints, "_write_json"),
    "flush": before(run_folder, "_flush"),
    "rename": before(Path, "rename"),
    "link": before(checkpoints, "point_link"),
    "prune": before(checkpoints, "_prune"),
    "between epochs": before(loader.UpdateLoader, "__iter__"),
    "summary": before(run_session, "write_summary"),
}


def install(phase: str, nth: int, action: Action) -> None:
    """Call `action` when `phase` is reached the `nth` time (from 1)."""
    count = [0]

    def hook() -> None:
        count[0] += 1
        if count[0] == nth:
            action()

    PHASES[phase](hook)
