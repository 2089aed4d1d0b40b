"""Real ranks without their imports: children forked from this process, over gloo.

A forked child has torch, timm and accelerate already, so a rank costs milliseconds in place of the
five seconds of a fresh interpreter. Each child is a process of its own: it can be killed, limited
in memory, and left hanging without harm to the test.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PYTHONPATH = os.pathsep.join(
    [str(Path(__file__).parent), str(ROOT)]
)  # of a process that is started


@dataclass(frozen=True)
class Outcome:
    """How one child ended."""

    exit_code: int  # negative: the signal that killed it
    value: Any  # what the function returned; None where it did not return
    error: str  # the traceback where it raised


def free_port() -> int:
    """A port that nobody listens at, and that the system gives to no connection of its own.

    It gives those from 32768 on, and another process might have one before the children listen.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_forked(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 1,
    timeout: float = 120.0,
    after: Callable[[list[int]], None] | None = None,
) -> list[Outcome]:
    """Run `function(rank, *args)` in `world_size` forked children and wait for all of them.

    With several, the environment is torchrun's, so `Accelerator(cpu=True)` starts gloo by itself.
    `after` is called with the process ids once all children run (to send them signals).

    Raises:
        TimeoutError: a child still ran after `timeout` seconds; all are killed first.
    """
    port = free_port()
    readers, pids = [], []
    for rank in range(world_size):
        reader, writer = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            reader.close()
            _child(function, args, rank, world_size, port, writer)
        writer.close()
        readers.append(reader)
        pids.append(pid)
    if after is not None:
        after(pids)
    deadline = time.monotonic() + timeout
    sent = [_receive(reader, deadline) for reader in readers]
    codes = []
    for pid in pids:
        while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                for other in pids:
                    _kill(other)
                raise TimeoutError(f"process {pid} still ran after {timeout} s: {sent}")
            time.sleep(0.01)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    return [Outcome(code, *(pair or (None, ""))) for code, pair in zip(codes, sent, strict=True)]


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the children returned; an error of any of them is an error of the test."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit_code == 0, f"rank {rank}: {outcome.exit_code}\n{outcome.error}"
    return [outcome.value for outcome in outcomes]


def run_fresh(module: str, function: str, *args: Any, timeout: float = 300.0) -> Any:
    """What `module.function(*args)` of the tests, in any folder of theirs, returns.

    In a fresh interpreter, for limits on memory: a forked child finds the memory that its parent
    has freed, and a limit on new memory does not bind.
    """
    with tempfile.NamedTemporaryFile() as file:
        code = (
            "import sys, pickle, importlib, torch; torch.set_num_threads(1); "
            f"value = getattr(importlib.import_module({module!r}), {function!r})(*{args!r}); "
            f"open({file.name!r}, 'wb').write(pickle.dumps(value))"
        )
        (home,) = (path.parent for path in (ROOT / "tests").rglob(f"{module}.py"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(home), PYTHONPATH]),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return pickle.loads(Path(file.name).read_bytes())


def _receive(reader: Any, deadline: float) -> Any:
    try:
        if reader.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(reader.recv_bytes())
    except (EOFError, ConnectionResetError):
        pass  # killed, or it left without a word
    return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _child(function: Any, args: Any, rank: int, world_size: int, port: int, writer: Any) -> None:
    code = 1
    try:
        faulthandler.enable()
        torch.set_num_threads(1)
        if world_size > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",  # as accelerate launch sets it; else Accelerate warns
            }
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        value = function(rank, *args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        writer.send_bytes(pickle.dumps((value, "")))  # by value: send() would share tensors' memory
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        writer.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no atexit of the parent's, no pytest
