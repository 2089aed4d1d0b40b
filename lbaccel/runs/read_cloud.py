"""Runs of a project on wandb's server as values, through `wandb.Api` (no torch)."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, RunFailed
from lbaccel.runs.read import Run, flatten, history_of, in_numbers, public
from lbaccel.runs.wandb_login import has_wandb_key
from lbaccel.text import one_line

CLOUD = "wandb:"
_PATH = re.compile(r"[^/\s]+/[^/\s]+(/[^/\s]+)?")


def is_cloud(target: str) -> bool:
    """Whether a RUN of the command line is on wandb's server; a file or folder here is not.

    >>> is_cloud("wandb:me/flowers"), is_cloud("runs/a")
    (True, False)
    """
    return target.startswith(CLOUD) and not Path(target).exists()


def load_wandb_cloud(target: str) -> list[Run]:
    """The runs of lbaccel in a project, oldest first, or the one that is named.

    Others are left out, and named on standard error. A run that has not ended well is read as far
    as it got: its `status` is then what wandb's server knows of it, such as crashed.

    Args:
        target: `wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/RUN_ID`.

    Raises:
        InputError: another form, no wandb, no login, or no run of lbaccel.
        RunFailed: the server can't be reached, or does not give it.
    """
    path = target.removeprefix(CLOUD)
    if not _PATH.fullmatch(path):
        raise InputError(
            f"{one_line(target)} names no project of wandb. Type {CLOUD}ENTITY/PROJECT, or "
            f"{CLOUD}ENTITY/PROJECT/RUN_ID for one run."
        )
    if importlib.util.find_spec("wandb") is None:
        raise InputError(f"{target}: reading it needs wandb. Type: pip install 'wandb>=0.31'")
    if not has_wandb_key():
        raise InputError(f"{target}: reading it needs a login. Type: wandb login")
    found = _found(target, path)
    runs = [_as_run(*one) for one in found if _is_ours(*one)]
    others = [one_line(str(one[0].name or one[0].id)) for one in found if not _is_ours(*one)]
    if not runs:
        raise InputError(
            f"{target} holds no run of lbaccel"
            + (f"; it holds {len(others)} others, such as {others[0]}. " if others else ". ")
            + "Give a project that lbaccel train has logged to."
        )
    if others:
        listed = ", ".join(others)
        print(f"{target}: left out, since lbaccel did not log it: {listed}", file=sys.stderr)
    return runs


def _found(target: str, path: str) -> list[tuple[Any, dict[str, Any], dict[str, Any], list]]:
    """Each run of wandb with its config, its summary, and its rows where it is ours."""
    import wandb
    from wandb.errors import AuthenticationError, UsageError

    try:
        api = wandb.Api()
        asked = api.runs(path, lazy=False) if path.count("/") == 1 else [api.run(path)]
        found = []
        for one in asked:  # page by page
            config = public(flatten(one.config or {}))
            summary = public(flatten(one.summary_metrics or {}))
            rows = list(one.scan_history()) if _is_ours(one, config, summary) else []
            found.append((one, config, summary, rows))
        return found
    except (AuthenticationError, UsageError) as error:
        raise InputError(
            f"{target}: wandb did not accept the login ({_reason(error)}). Check the network, or "
            "type: wandb login --relogin"
        ) from error
    except Exception as error:  # wandb's, of the network, or a plain ValueError for what is absent
        raise RunFailed(
            f"{target} can't be read from wandb ({type(error).__name__}: {_reason(error)}). Check "
            "the names and the network; runs on this machine are read from their folders."
        ) from error


def _reason(error: Exception) -> str:
    return one_line(" ".join(str(error).split())[:300])


def _is_ours(one: Any, config: Mapping[str, Any], summary: Mapping[str, Any], *_: Any) -> bool:
    """Whether `start_trackers` logged it: the recipe names its plan, any loop its samples."""
    return "global_batch_size" in config and (
        "plan/equation" in config or "samples_seen" in summary
    )


def _as_run(
    one: Any, config: Mapping[str, Any], summary: Mapping[str, Any], rows: Iterable[Mapping]
) -> Run:
    status = summary.get("status")
    if status in (None, "running") and one.state not in ("finished", "running"):
        status = one.state  # the process died before it could say how it ended
    known = {} if status is None else {"status": status}
    return Run(
        name=str(one.name or one.id),
        config=dict(config),
        summary={**in_numbers(summary), **known},
        history=history_of(row for row in map(_row, rows) if row is not None),
        source="wandb-cloud",
    )


def _row(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row without what it does not hold: the server fills it with None, and NaN is a string."""
    row = {key: value for key, value in raw.items() if value is not None}
    update = row.get("update", row.get("_step"))
    if isinstance(update, bool) or not isinstance(update, (int, float)) or update != int(update):
        return None
    return {**row, "update": int(update)}
