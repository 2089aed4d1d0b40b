"""Many runs of pytest for one import of torch: a process that imports it once and forks each run.

Run as a script this file is the server: it imports the libraries, never lbaccel, starts no thread
and computes nothing, so that torch works in its children. It reads one request a line (JSON with
`tree`, `arguments`, `output` and `timeout`) and answers with the child's exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

TIMED_OUT = 124
NOT_RUN = 126  # pytest itself failed
OTHER_PACKAGE = 125  # the tests imported another lbaccel than the tree's
LIBRARIES = (
    *("torch", "torchvision", "timm", "timm.scheduler", "timm.optim", "timm.data", "accelerate"),
    *("accelerate.state", "torch.distributed", "torch.testing", "safetensors.torch", "yaml"),
    *("sklearn.datasets", "scipy.stats", "PIL.Image", "pytest", "filelock"),
    *("doctest", "hypothesis.internal.conjecture.engine", "xdist.plugin"),
)


class PytestServer:
    """Starts the server; `run` gives exit code and output of pytest in a tree of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)  # a tree's package is the only one that it can find
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tree: Path, *arguments: str, timeout: float = 300.0) -> tuple[int, str]:
        """A negative code is the signal that ended pytest; `TIMED_OUT`: it was killed."""
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            request = {
                "tree": str(tree),
                "arguments": arguments,
                "output": str(output),
                "timeout": timeout,
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the server of pytest runs has ended"
            return int(answer), output.read_text(errors="replace")

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def serve() -> None:
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            child(request)
        print(wait(pid, request["timeout"]), file=answers, flush=True)


def wait(pid: int, timeout: float) -> int:
    """The child's exit code; then nothing of its group lives on."""
    deadline, code = time.monotonic() + timeout, None
    while code is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = TIMED_OUT
        else:
            time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return code


def child(request: dict[str, Any]) -> NoReturn:
    code = NOT_RUN
    try:
        os.setsid()
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        tree = request["tree"]
        os.chdir(tree)
        os.environ["PYTHONPATH"] = tree  # for the processes that tests start
        sys.path[0] = tree  # in place of the folder of this file
        import pytest

        # its plugins' packages are there already, and their assertions are none of ours
        imported = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
        code = int(pytest.main([*imported, *request["arguments"]]))
        package = sys.modules.get("lbaccel")
        if package is not None and not str(package.__file__).startswith(tree):
            print(f"lbaccel is {package.__file__}, not that of {tree}")
            code = OTHER_PACKAGE
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
