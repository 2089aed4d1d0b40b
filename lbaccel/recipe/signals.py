"""Ctrl-C, SIGTERM and SIGHUP end a run in good order: after the update, with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lbaccel.recipe.launcher_watch import has_launcher, watched_launcher

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
ECHO = 1.0  # seconds: a launcher forwards the SIGINT that the terminal sent to its ranks too


@contextmanager
def graceful_signals(
    request_stop: Callable[[], object], *, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP call `request_stop`; a second SIGINT raises at once.

    SIGTERM and SIGHUP never raise: batch systems send them more than once, and to every process.
    A signal that this process was started to ignore (`nohup`) stays ignored. Under a launcher,
    SIGINTs within a second of the first are one: the terminal sends it, and the launcher forwards
    it. A launcher that dies calls `request_stop` too (see `launcher_watch`). Outside the main
    thread, where handlers can't be set, nothing changes.

    Args:
        request_stop: asks for the end after this update.
        clock: seconds.

    Raises:
        KeyboardInterrupt: at the second SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    echo = ECHO if has_launcher() else 0.0
    first: list[float] = []  # when the first SIGINT came

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if first and clock() - first[0] >= echo:
                raise KeyboardInterrupt
            first.append(clock())
        request_stop()

    before: dict[int, Any] = {}
    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # None: a handler that Python did not set, and can't put back
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handle)
    try:
        with watched_launcher(request_stop):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
