"""The runs of a study as processes: each is claimed by one worker, and none is run twice."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lbaccel.errors import InputError, RunFailed
from lbaccel.launch import (
    OMP_THREADS,
    VISIBLE_GPUS,
    chose_threads,
    num_cores,
    visible_gpus,
    with_variables,
)
from lbaccel.recipe.options import OPTIONS, default_of
from lbaccel.recipe.signals import graceful_signals
from lbaccel.recipe.values import words
from lbaccel.runs.folder import atomic_write_text, plain, strict_json
from lbaccel.runs.pace import clock_time
from lbaccel.studies.folder import (
    CLAIM,
    ENDED,
    LOG,
    SETTINGS,
    State,
    cell_folder,
    run_folder,
    state_of,
    without_result,
)
from lbaccel.studies.outcome import unreadable, value_in
from lbaccel.studies.spec import Study, StudyCell
from lbaccel.text import printable

Say = Callable[[str], object]
TRAIN = (sys.executable, "-m", "lbaccel.train")
_LOOK_EVERY = 0.2  # seconds, at the processes


@dataclass
class Tally:
    """How many runs ended, and how long they took.

    Attributes:
        ended: runs with a result, those of before among them.
        total: all runs.
        seconds: of each run that ended here.
        failed: names of runs that ended in an error, with its last line.
        elsewhere: names of runs that other workers hold.
    """

    total: int
    ended: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)

    def left(self, jobs: int) -> str:
        """The time that the other runs will take, in words; "" before one ended."""
        waiting = self.total - self.ended - len(self.failed)
        if not self.seconds or waiting <= 0:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        return f", about {clock_time(mean * waiting / jobs)} left"


@dataclass
class Worker:
    """One process that takes the runs of a study which nobody has taken yet.

    Attributes:
        folder: of the study.
        study: whose runs they are.
        jobs: runs at one time.
        say: prints a line.
        command: of a run, before its own arguments.
        stopped: a signal came.
    """

    folder: Path
    study: Study
    jobs: int
    say: Say
    command: Sequence[str] = TRAIN
    stopped: bool = False
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _slots: SimpleQueue[int] = field(default_factory=SimpleQueue)  # free ones, each with a GPU
    _refused: str = ""

    def run(self, cells: Sequence[StudyCell]) -> Tally:
        """Run all cells that have no result yet; a signal ends the runs in good order.

        Raises:
            InputError: an arm can't run: the error of `lbaccel train`. Runs with a result stay.
        """
        waiting = without_result(self.folder, cells)
        tally = Tally(len(cells), len(cells) - len(waiting))
        self._look_at(cells, tally)
        if tally.ended:
            self.say(f"{tally.ended} of {tally.total} runs have their result already")
        self._slots = SimpleQueue()
        for slot in range(self.jobs):
            self._slots.put(slot)
        with (
            graceful_signals(self._stop),
            ThreadPoolExecutor(self.jobs, thread_name_prefix="run") as threads,
        ):
            for _ in threads.map(lambda cell: self._one(cell, tally), waiting):
                pass
        if self._refused:
            raise InputError(self._refused)
        return tally

    def _look_at(self, cells: Sequence[StudyCell], tally: Tally) -> None:
        """A run that ended and can't be read has no result: it is told, and left as it is."""
        for cell in cells:
            run = run_folder(self.folder, cell)
            if run is None or state_of(run) not in ENDED:
                continue
            fault = unreadable(run)
            if fault is not None:
                tally.ended -= 1
                tally.failed[cell.name] = f"it ended, and can't be read any more: {fault}"
                self.say(
                    f"{cell.name} ended, and can't be read any more: {fault} To run it again, move "
                    f"{run} away."
                )

    def _one(self, cell: StudyCell, tally: Tally) -> None:
        if self.stopped or self._refused:
            return
        home = cell_folder(self.folder, cell)
        home.mkdir(parents=True, exist_ok=True)
        with claimed(home) as claim:
            state = self._state(cell)
            if state in ENDED:  # by another worker, since this one looked
                self._count(tally)
                return
            if claim is None or state == "running":
                with self._lock:
                    tally.elsewhere.append(cell.name)
                return
            start = time.monotonic()
            slot = self._slots.get()
            try:
                code = self._process(cell, home, slot, claim)
            finally:
                self._slots.put(slot)
            self._after(cell, code, time.monotonic() - start, tally)

    def _process(self, cell: StudyCell, home: Path, slot: int, claim: int) -> int:
        prepare(self.study, cell, home)
        line = [*self.command, *arguments(home)]
        environment = with_variables(_share_of_machine(self.jobs, slot))
        with (home / LOG).open("ab") as log:
            log.write(f"$ {shlex.join(line)}\n".encode())
            log.flush()
            with self._lock:
                if self.stopped:
                    return 130
                child = subprocess.Popen(
                    line,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=(claim,) if os.name == "posix" else (),
                )
                self._children[cell.name] = child
            if self.stopped:  # the signal came while the process was being made
                child.terminate()
        code = child.wait()
        with self._lock:
            del self._children[cell.name]
        return code

    def _after(self, cell: StudyCell, code: int, seconds: float, tally: Tally) -> None:
        state = self._state(cell)
        if state in ENDED:
            with self._lock:
                tally.seconds.append(seconds)
            self._count(tally, f"{cell.name}: {self._result(cell, state)} in {clock_time(seconds)}")
        elif not self.stopped:
            reason = last_line(cell_folder(self.folder, cell) / LOG)
            with self._lock:
                tally.failed[cell.name] = reason
            self.say(f"{cell.name} failed: {reason}")
            if code == 2:
                why = reason.removeprefix("error: ")
                self._refused = f"arm {cell.arm} at batch {cell.batch} can't run: {why}"

    def _result(self, cell: StudyCell, state: State) -> str:
        run = run_folder(self.folder, cell)
        value = None if run is None else value_in(run, self.study)
        shown = "no value" if value is None else f"{value:.2f}"
        return f"{self.study.metric} {shown}" if state == "done" else "diverged"

    def _count(self, tally: Tally, what: str = "") -> None:
        with self._lock:
            tally.ended += 1
            if what:
                self.say(f"[{tally.ended}/{tally.total}] {what}{tally.left(self.jobs)}")

    def _state(self, cell: StudyCell) -> State:
        return state_of(run_folder(self.folder, cell))

    def _stop(self) -> None:
        self.stopped = True
        # a handler may run inside `with self._lock` of this thread, so it takes no lock
        for child in list(self._children.values()):
            child.terminate()


def prepare(study: Study, cell: StudyCell, home: Path) -> None:
    """Write the settings of a cell, as `--config` reads them; a study is a group of wandb."""
    own: dict[str, Any] = {}
    if "wandb" in words(cell.settings.get("log_with", default_of("log_with"))):
        own = {
            "wandb_group": "-".join(filter(None, (study.name, study.scale))),
            "wandb_tags": [word for word in (cell.arm, study.scale) if word],
            "wandb_name": cell.name,
        }
    if study.target is not None and study.target.metric in OPTIONS["monitor"].choices:
        own |= {"target": study.target.value, "monitor": study.target.metric}
    whole = plain({**own, **cell.settings})
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    atomic_write_text(home / SETTINGS, text)


def arguments(home: Path) -> list[str]:
    """Of `lbaccel train` for the cell in this folder, which goes on where it was killed."""
    return ["--config", str(home / SETTINGS), "--output", str(home), "--resume", "auto"]


def alike(cells: Sequence[StudyCell]) -> dict[str, str]:
    """Of each run whose settings an earlier one has too, the name of that one."""
    first: dict[str, str] = {}
    found = {}
    for cell in cells:
        key = strict_json(dict(sorted(cell.settings.items())))
        name = first.setdefault(key, cell.name)
        if name != cell.name:
            found[cell.name] = name
    return found


def command_lines(folder: Path, cells: Sequence[StudyCell]) -> Iterator[str]:
    """A shell line for each run that has no result yet; any machine may take it, at any time."""
    for cell in without_result(folder, cells):
        yield shlex.join(["lbaccel", "study", "run", str(folder.absolute()), "--only", cell.name])


@contextmanager
def claimed(home: Path) -> Iterator[int | None]:
    """Claim the cell of a folder by a lock of the system; None where another process has it.

    The value is the descriptor of the locked file. A process that inherits it keeps the claim until
    it ends, though the one that made it may be killed.

    Raises:
        RunFailed: the folder lies where files can't be locked.
    """
    lock = FileLock(home / CLAIM, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    except (OSError, NotImplementedError) as error:
        raise RunFailed(
            f"{home} lies where files can't be locked ({error}), so two workers could take one "
            "run. Use a folder on another file system."
        ) from error
    try:
        yield lock._context.lock_file_fd
    finally:
        lock.release()


def last_line(log: Path) -> str:
    """The last line of a run's own words, as it may be printed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        return f"{log}: {error.strerror}"
    told = [line.strip() for line in lines if line.strip()]
    errors = [line for line in told if line.startswith("error: ")]
    return printable((errors or told or ["it said nothing"])[-1])


def _share_of_machine(jobs: int, slot: int) -> Mapping[str, str]:
    """Threads and a GPU for one of several runs at a time, where the user chose none."""
    found: dict[str, str] = {}
    if jobs > 1 and not chose_threads():
        found[OMP_THREADS] = str(max(1, num_cores() // jobs))
    gpus = visible_gpus() if jobs > 1 else []
    if len(gpus) > 1:
        found[VISIBLE_GPUS] = gpus[slot % len(gpus)]
    return found
