"""Two real ranks: processes forked from this one, over gloo, which report and are gone.

A forked child has torch and the model already, so a rank costs milliseconds. It never returns into
the parent's stack: no atexit, no test runner, nothing on its standard output.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lbaccel.verification.copies import described

Report = tuple[Literal["value", "error", "no start"], Any]
"""The kind of report, and its content: a value, an error, or the reason why no rank began."""


def why_no_ranks() -> str | None:
    """Why this process can't fork ranks; None where it can."""
    if not hasattr(os, "fork"):
        return f"two ranks are forked processes, and {sys.platform} has no fork"
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch was built without gloo, which two ranks on a CPU need"
    if dist.is_initialized():
        return "a process group runs in this process already: verify in a process of its own"
    if torch.cuda.is_initialized():
        return (
            "CUDA is in use in this process, and forked ranks can't share it: call verify() "
            "before the first CUDA call, or `lbaccel verify`"
        )
    return None


def run_ranks(
    function: Callable[[int], Any], *, world_size: int = 2, timeout_seconds: float = 600.0
) -> list[Report]:
    """Run `function(rank)` in forked ranks of one gloo group, and wait for all of them.

    Its result or error comes back pickled. A rank that hangs is killed and reported as an
    error; none outlives this call.
    """
    with tempfile.TemporaryDirectory(prefix="lbaccel_verify_") as folder:
        children: list[tuple[int, Any]] = []
        deadline = time.monotonic() + timeout_seconds
        try:
            for rank in range(world_size):
                children.append(_fork(function, rank, world_size, Path(folder), timeout_seconds))
            return [_receive(reader, deadline, timeout_seconds) for _, reader in children]
        finally:
            for pid, reader in children:
                reader.close()
                _end(pid, min(deadline, time.monotonic() + 2.0))


def _fork(
    function: Callable[[int], Any], rank: int, world_size: int, folder: Path, timeout: float
) -> tuple[int, Any]:
    reader, writer = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; the child starts none of its own before gloo.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            reader.close()
            writer.send_bytes(pickle.dumps(_rank(function, rank, world_size, folder, timeout)))
        finally:
            os._exit(0)
    writer.close()
    return pid, reader


def _rank(
    function: Callable[[int], Any], rank: int, world_size: int, folder: Path, timeout: float
) -> Report:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # gloo and a second copy of the user's prints
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = os.fdopen(nowhere, "w")
    try:
        torch.set_num_threads(1)  # the parent's thread pool did not come along
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    except Exception as error:
        return ("no start", f"gloo could not start two ranks: {described(error)}")
    try:
        report: Report = ("value", function(rank))
        dist.barrier()
        return report
    except Exception as error:
        return ("error", (type(error).__name__, described(error)))


def _receive(reader: Any, deadline: float, timeout: float) -> Report:
    try:
        if reader.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(reader.recv_bytes())
        return ("no start", f"the ranks did not finish within {timeout:.0f} s, and were ended")
    except EOFError:
        return ("error", ("EOFError", "a rank ended without a word (killed, or out of memory)"))


def _end(pid: int, deadline: float) -> None:
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.005)
