"""Standard output that was closed, or is closed under a command: the command goes on without it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class SteadyText(io.TextIOWrapper):
    """A text stream that throws away what can't be written, and says so once on the other one.

    A reader that ends early (`| head`), a terminal that is closed, or a full disk under `> FILE`
    is no reason to lose a run. Characters that the encoding does not have are written as escapes.
    """

    def __init__(self, stream: Any, *, name: str) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self.label = name

    def write(self, text: str) -> int:
        """Write, or throw away."""
        try:
            return super().write(text)
        except OSError as error:
            self._throw_away(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or throw it away."""
        try:
            super().flush()
        except OSError as error:
            self._throw_away(error)

    def _throw_away(self, error: OSError) -> None:
        # the buffer keeps what it could not write: from here on it goes into the void
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.fileno())
        os.close(devnull)
        with suppress(OSError):
            super().flush()
        other = sys.stderr if self.label == "stdout" else sys.stdout
        why = error.strerror or error
        with suppress(OSError, ValueError):
            print(f"note: {NAMES[self.label]} can't be written ({why}); the command goes on "
                  "without it.", file=other, flush=True)  # fmt: skip


@contextmanager
def steady_output() -> Iterator[None]:
    """Inside, no write to standard output or standard error fails.

    A stream that was closed at the start (`>&-`) is opened to the void: else the next file that
    the process opens takes its number, and a line that is printed ends up in that file. A stream
    that someone replaced (a notebook, a test) stays as it is.
    """
    _fill_closed()
    before: dict[str, Any] = {}
    for name in NAMES:
        stream = getattr(sys, name)
        if stream is None:
            # lives as long as the process, since others may keep it
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif stream is getattr(sys, f"__{name}__") and type(stream) is io.TextIOWrapper:
            before[name] = stream
            steady = SteadyText(stream, name=name)
            _flush_through(stream, steady)
            setattr(sys, name, steady)
    try:
        yield
    finally:
        for name, stream in before.items():
            steady = getattr(sys, name)
            setattr(sys, name, stream)
            if isinstance(steady, SteadyText):
                steady.flush()
                steady.detach()  # else its end would close the buffer of both


def _flush_through(stream: Any, steady: SteadyText) -> None:
    """Write what `stream` still holds; both share one buffer."""
    try:
        stream.flush()
    except OSError as error:
        steady._throw_away(error)


def _fill_closed() -> None:
    """Open descriptors 0 to 2 to the void where they are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
            os.set_inheritable(number, True)
