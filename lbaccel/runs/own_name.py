"""Run folders under the names that they were made with: no copies, the newest first (no torch)."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from lbaccel.errors import reading
from lbaccel.runs.folder import CONFIG, ENVIRONMENT, RUN_NAME

_STAMP = re.compile(r"\d{8}-\d{6}(?=-)")
_DAY = 24 * 3600  # folders are named in local time, which differs by less between machines


def own_runs(output: Path) -> list[Path]:
    """The run folders in `output` that are no copies, newest first by the time in their name.

    A run knows the name that it was made with, so that a folder with another name is a copy (or
    was renamed). One of a time that is yet to come was named by a wrong clock and comes last.
    """
    if not output.is_dir():
        return []
    with reading(output):
        names = sorted(path.name for path in output.iterdir() if (path / CONFIG).is_file())
    own = [name for name in names if _made_as(output / name, names) == name]
    latest = time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() + _DAY))

    def key(name: str) -> tuple[bool, str]:
        stamp = _STAMP.match(name)
        return (stamp is None or stamp[0] <= latest, name)

    return [output / name for name in sorted(own, key=key, reverse=True)]


def _made_as(run: Path, names: list[str]) -> str:
    """The name that a run folder was made with; of before 0.2, which did not note it, a guess."""
    try:
        noted = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8")).get(RUN_NAME)
    except (OSError, ValueError, AttributeError):
        noted = None
    if isinstance(noted, str):
        return noted
    longer = (
        name
        for name in names
        if run.name.startswith(name) and not re.fullmatch(r"(-\d+)?", run.name[len(name) :])
    )
    return next(longer, run.name)
