"""Errors of other libraries that a user can act on, each turned into one sentence (no torch)."""

from __future__ import annotations

import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lbaccel.errors import InputError, RankFailed, RunFailed, is_told
from lbaccel.launch import rank

# torch raises these from the handler of SIGCHLD, at whatever line the main process is
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) "
    r"(?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly)"
)
_SHARED_MEMORY = re.compile(
    r"insufficient shared memory|received \d+ items of ancdata|"
    r"unable to (open|allocate|mmap|resize)[^:]* shared memory|unable to write to file </?torch_"
)
_MOST_CAUSES = 20
_TAKES_OVER = "torch.multiprocessing.reductions"
# gloo, then NCCL, then the store of torch.distributed
_PEER = re.compile(
    r"gloo/transport|Connection closed by peer|Connection reset by peer|"
    r"remote process exited or there was a network error|ncclRemoteError|"
    r"NCCL communicator was aborted|"
    r"NCCL (Error|error)[^\n]*(remote|unhandled system)|Socket Timeout|"
    r"(Timed out|timed out after \d+ ?(ms|seconds)) waiting for"
)


def in_a_sentence(error: BaseException) -> BaseException:
    """The error itself, or a RunFailed in its place that says what happened and what to type.

    Known are: a process that loads images and was killed, no shared memory for its images, memory
    that ran out outside an update, and another rank that ended or can't be reached.

    Returns:
        A RunFailed, which the first rank prints; a RankFailed where only this rank can know of it.
        `error` itself where it is one of lbaccel's own, or a defect.

    >>> error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    >>> str(in_a_sentence(error))[:61]
    'a process that loads images (pid 7) ended by itself (Killed),'
    >>> in_a_sentence(KeyError("k"))
    KeyError('k')
    """
    if isinstance(error, (InputError, RunFailed)) or not isinstance(error, Exception):
        return error
    lost = isinstance(error, RuntimeError) and _PEER.search(str(error)) is not None
    text = _lost_peer(error) if lost else _own_fault(error)
    if text is None:
        return error
    # a lost peer is noticed by all: the second rank speaks too, as the first may be the lost one
    speaks = rank() <= 1 if lost else not is_told(error)
    found = (RankFailed if speaks else RunFailed)(text)
    found.__cause__ = error
    return found


@contextmanager
def workers_may_end() -> Iterator[None]:
    """Inside, the death of a worker raises nothing: what is written there needs no worker.

    torch raises from the handler of SIGCHLD, so that the end of a run whose worker was killed would
    be cut short by a second error about the same worker.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def first_line(error: BaseException, most: int = 160) -> str:
    """The error's first line without its full stop, for the middle of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:most].rstrip(". ")


def _own_fault(error: Exception) -> str | None:
    if isinstance(error, (RuntimeError, OSError)) and _SHARED_MEMORY.search(str(error)):
        return (
            f"no shared memory was left for loaded images ({first_line(error)}). Make /dev/shm "
            "larger (docker run --shm-size 8g), or use fewer processes (--workers)."
        )
    worker = _end_of_a_worker(error)
    if worker is not None:
        how = (worker["signal"] or "an exit").strip()
        return _ended(f" (pid {worker['pids']})", how)
    if isinstance(error, (OSError, EOFError)) and _reads_from_a_worker(error):
        return _ended("", first_line(error))
    if _is_out_of_memory(error):
        return (
            f"memory ran out outside an update ({first_line(error)}). Use a smaller "
            "--micro-batch-size, --activation-checkpointing full, or more --memory."
        )
    return None


def _end_of_a_worker(error: BaseException | None) -> re.Match[str] | None:
    """The signal of a worker among the errors from which this one came.

    The handler raises at any line. The line may then fail in another way (`Thread.start` with a
    KeyError), and torch's own account of what a worker left unread says less: the oldest counts.
    """
    found = None
    for _ in range(_MOST_CAUSES):
        if error is None:
            break
        if isinstance(error, RuntimeError):
            found = _WORKER.search(str(error)) or found
        error = error.__cause__ or error.__context__
    return found


def _ended(pid: str, how: str) -> str:
    return (
        f"a process that loads images{pid} ended by itself ({how}), which is often the system's "
        "answer to a lack of memory. Use fewer of them (--workers), or --workers 0."
    )


def _reads_from_a_worker(error: Exception) -> bool:
    """Whether the error came while a tensor was taken over from a worker, which is gone."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(f.f_globals.get("__name__") == _TAKES_OVER for f, _ in frames)


def _lost_peer(error: Exception) -> str:
    return (
        f"the connection to another rank broke ({first_line(error)}): its process ended, and says "
        "why in its own last line, or the network failed."
    )


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from lbaccel.update.memory.oom import is_out_of_memory

    return is_out_of_memory(error)
