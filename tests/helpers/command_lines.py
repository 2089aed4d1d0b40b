"""lbaccel's command line as a process of its own: started, waited for, and surely ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

# registers the tiny network, and runs the command line
STARTER = "import sys, tiny; from lbaccel.cli import main; sys.exit(main())"
HELPERS = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[2])
FAR = 120.0  # seconds: a process that does not end by then hangs


def environment(**more):
    path = os.pathsep.join([ROOT, HELPERS])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


@contextmanager
def started(*command, cwd, env=None, **options):
    """A process in a session of its own, which is over at the end, with all its children."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**(env or {})),
        start_new_session=True,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        with_group_killed(process)


def with_group_killed(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(condition, what):
    end = time.monotonic() + FAR
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {FAR:g} s")


def finished(process):
    out, _ = process.communicate(timeout=FAR)
    return process.returncode, out
