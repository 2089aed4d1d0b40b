"""Cases of a benchmark, each in a process of its own that is forked before CUDA is."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError

GRACE = 30.0  # seconds for a case that has begun
STATES = "all.jsonl"  # of all.py: how far each part is


@dataclass
class Child:
    case: Any
    process: int
    pipe: Any
    start: float


def run_each(
    function: Callable[[Any], dict[str, Any]],
    cases: Sequence[Any],
    *,
    num_workers: int = 1,
    until: float,
    kill_at: float,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Pairs (case, what `function` found) as they come, `num_workers` at a time.

    No case starts after `until`, and what still runs at `kill_at` (both of `time.monotonic`) is
    ended and left out. A case that fails comes back as {"error": text}.
    """
    waiting, running = list(cases), list[Child]()
    while waiting or running:
        while waiting and len(running) < num_workers and time.monotonic() < until:
            running.append(_start(function, waiting.pop(0)))
        if not running:
            return
        timeout = max(0.0, kill_at - time.monotonic())
        ready = select.select([child.pipe for child in running], [], [], timeout)[0]
        for child in [child for child in running if child.pipe in ready]:
            running.remove(child)
            yield child.case, _end(child)
        if not ready:
            for child in running:
                os.kill(child.process, signal.SIGKILL)
                _end(child)
            return


def _start(function: Callable[[Any], dict[str, Any]], case: Any) -> Child:
    sys.stdout.flush()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            found = function(case)
        except BaseException as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    return Child(case, process, os.fdopen(reader, "rb"), time.monotonic())


def _end(child: Child) -> dict[str, Any]:
    with child.pipe:
        content = child.pipe.read()
    _, status = os.waitpid(child.process, 0)
    seconds = round(time.monotonic() - child.start, 1)
    found = pickle.loads(content) if content else {"error": f"it ended with status {status}"}
    return {**found, "case_seconds": seconds}


def cuda_or_exit() -> dict[str, Any]:
    """Name and bytes of the GPU, asked in a child: this process must not touch CUDA.

    Without one, or with one that no plan can be made for, the process ends with code 2.
    """
    now = time.monotonic()
    found = dict(run_each(_look, [None], until=now + 60, kill_at=now + 120)).get(None, {})
    if "name" not in found:
        print(f"error: {found.get('error', 'the GPU did not answer')}", file=sys.stderr)
        sys.exit(2)
    return found


def _look(_: None) -> dict[str, Any]:
    import torch

    from lbaccel.planning.cost.devices import device_at_hand

    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device here, and this measures nothing else.")
    total = torch.cuda.get_device_properties(0).total_memory
    return {"name": device_at_hand().name, "bytes": total}


def read(path: Path, kind: Any) -> dict[Any, dict[str, Any]]:
    """The last line of each case of a file of JSON lines; a line that was cut off is none."""
    names = [field.name for field in fields(kind)]
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[kind(*(row.pop(name) for name in names))] = row
    return found


def append(path: Path, case: Any, row: dict[str, Any]) -> None:
    """Add a line, whole and on the disk before the next case."""
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        print("\n" * cut_off + json.dumps({**asdict(case), **row}), file=file, flush=True)
        os.fsync(file.fileno())


def results_file(name: str) -> Path:
    """In $OUT where it is set, else here."""
    return Path(os.environ.get("OUT", ".")) / name


def run_cases(
    name: str,
    cases: Callable[[bool], Sequence[Any]],
    run: Callable[[Any, str], dict[str, Any]],
    table: Callable[[dict[Any, dict[str, Any]]], str],
    *,
    start: float,
) -> int:
    """The whole of a benchmark: flags, cases that are missing, a line each, and the table.

    Args:
        name: of the file of results, without its ending.
        cases: all of them, or with True the few small ones of a dry run on a CPU.
        run: (case, "cuda" or "cpu") -> what it found.
        table: of the cases that did not fail.
        start: `time.monotonic` at the beginning, imports included.

    Returns:
        0 where every case has its result, 1 where some are missing.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=results_file(f"{name}.jsonl"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--dry", action="store_true", help="a few small cases on the CPU")
    a = parser.parse_args()
    where = "cpu" if a.dry else "cuda"
    device = {"name": "cpu, a dry run"} if a.dry else cuda_or_exit()
    wanted = list(cases(a.dry))
    rows = read(a.results, type(wanted[0]))
    missing = [case for case in wanted if "error" in rows.get(case, {"error": "none"})]
    print(f"{device['name']}: {len(missing)} of {len(wanted)} cases, {a.results}", flush=True)
    until = start + a.seconds
    found = run_each(lambda case: run(case, where), missing, until=until, kill_at=until + GRACE)
    for case, row in found:
        row = {**row, "device": device["name"]}
        append(a.results, case, row)
        rows[case] = row
        print(*asdict(case).values(), row.get("error", "done"), flush=True)
    done = {c: row for c in wanted if (row := rows.get(c)) is not None and "error" not in row}
    if done:
        print(table(done))
    print(f"{len(done)} of {len(wanted)} cases")
    return 0 if len(done) == len(wanted) else 1
