"""A rank whose launcher was killed ends by itself: after the update, with a checkpoint."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lbaccel.launch import PARENT, rank, under_elastic_launcher

EVERY = 1.0  # seconds between two looks
BOUND = 600.0  # seconds until a rank that waits for a dead one is ended


@contextmanager
def watched_launcher(
    request_stop: Callable[[], object],
    *,
    every: float = EVERY,
    bound: float = BOUND,
) -> Iterator[None]:
    """Inside, the death of the launcher that started this process calls `request_stop`.

    A launcher that is killed with SIGKILL can't end its ranks, and they would train on unseen. A
    process that a shell started outlives its shell, as `nohup` asks. Ranks of a distributed launch
    that are not done `bound` seconds later are ended without a checkpoint: a rank can wait
    without end for one that was killed with the launcher.

    Args:
        request_stop: asks for the end after this update.
        every: seconds between two looks at the parent.
        bound: seconds that the end may take.
    """
    if not has_launcher():
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while os.getppid() == PARENT:
            if over.wait(every):
                return
        _say("the launcher died; this run ends after this update, with a checkpoint.")
        request_stop()
        # one process waits for nobody, and its update may be long
        if under_elastic_launcher() and not over.wait(bound):
            _say(f"the launcher died, and the update did not end within {bound:g} s. "
                 "To go on: lbaccel train --resume RUN")  # fmt: skip
            os._exit(1)

    thread = threading.Thread(target=watch, name="launcher watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def has_launcher() -> bool:
    """Whether torch's elastic launcher or accelerate's simple one started this process."""
    if under_elastic_launcher():
        return True
    try:
        line = Path(f"/proc/{PARENT}/cmdline").read_bytes().split(b"\0")
    except OSError:  # no /proc on macOS; or the parent has died
        return False
    # `accelerate launch`, or `python -m accelerate.commands.launch`
    names = [word.rpartition(b"/")[2] for word in line[:3]]
    return b"accelerate" in names or any(w.startswith(b"accelerate.commands") for w in names)


def _say(text: str) -> None:
    if rank() == 0:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
