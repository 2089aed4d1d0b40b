"""Loader workers outlive the signals that end a run in good order: the last update needs them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

IGNORED = ("SIGINT", "SIGHUP")  # a terminal sends both to every process of the run


def let_the_parent_decide(worker: int) -> None:
    """The `worker_init_fn` of lbaccel's DataLoaders: only the parent ends a worker.

    Ctrl-C, a closed terminal and `kill -TERM -PGID` reach every process of the run. The run itself
    finishes its update, and needs the workers for that. SIGTERM from the parent, which is how
    DataLoader and multiprocessing end a worker that is stuck, ends it at once; so does any SIGTERM
    after the parent's death. Where the platform does not name a signal's sender (macOS), the first
    SIGTERM is ignored, and the second one ends the worker.

    Args:
        worker: its number, not used.
    """
    for name in IGNORED:
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, _only_once)
        return
    # blocked here, so that the thread below receives it, with its sender
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_parents_word, daemon=True).start()


def _only_once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def _wait_for_the_parents_word() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent.pid or not parent.is_alive():
            os._exit(0)
