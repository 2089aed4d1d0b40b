"""A line on the terminal while a command works without other output (no torch)."""

from __future__ import annotations

import sys
import time


class Waiting:
    """One line on standard error, overwritten, until its `with` ends; in a file or a pipe nothing.

    Args:
        name: of the command, at the beginning of the line.
        after: seconds until the first line: a command that ends before says nothing.
    """

    def __init__(self, name: str, *, after: float = 2.0) -> None:
        self._name, self._start, self._after = name, time.monotonic(), after
        self._shown = False

    def say(self, line: str) -> None:
        """Show where the command is."""
        seconds = time.monotonic() - self._start
        if sys.stderr.isatty() and seconds >= self._after:
            self._shown = True
            text = f"\r\033[K{self._name}: {line} ({seconds:.0f} s) "
            print(text, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:  # a sentence that follows begins at the left
            print("\r\033[K", end="", file=sys.stderr, flush=True)
