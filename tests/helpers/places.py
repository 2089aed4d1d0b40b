"""Folders that the tests of one process share; they go when its pytest ends.

A worker of pytest-xdist ends without `atexit`, so conftest.py calls `remove_all`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_made: list[Path] = []


def shared_folder(name: str) -> Path:
    """A new folder for all tests of this process."""
    _made.append(Path(tempfile.mkdtemp(prefix=f"lbaccel_{name}_")))
    return _made[-1]


def remove_all() -> None:
    """Remove what `shared_folder` made."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
