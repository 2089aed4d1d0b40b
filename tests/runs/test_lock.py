"""One run, one writer: a second one is told who holds it, and what a killed one left is free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from forks import run_forked, values
from runs_of_recipe import BASE, at_update, run, stopped_at

from lbaccel import RunFailed, train
from lbaccel.commands import export
from lbaccel.runs import lock
from lbaccel.runs.folder import LOCK, WRITER
from lbaccel.runs.own_name import own_runs
from lbaccel.runs.tracking import RunFolderTracker


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lock, "_DYING_SECONDS", 0.0)  # each refusal would come so much later


def refused(rank, folder):
    """What another process is told that wants to write into `folder`."""
    try:
        lock.take(Path(folder), say=print, instead=", or start another")
    except RunFailed as error:
        return str(error)
    return "taken"


def in_another_process(folder):
    (said,) = values(run_forked(refused, str(folder)))
    return said


def test_another_process_is_told_who_writes_and_since_when(tmp_path):
    with lock.writing(tmp_path, say=print):
        holder = lock.holder_of(tmp_path)
        said = in_another_process(tmp_path)
        assert said == (
            f"{tmp_path} is being written by process {os.getpid()} on {os.uname().nodename}, "
            f"started {holder.started}, and a run has one writer. Wait for its end, or stop it, or "
            "start another."
        )
    assert in_another_process(tmp_path) == "taken"


def test_a_process_may_take_it_twice_and_gives_it_back_as_often(tmp_path):
    with lock.writing(tmp_path, say=print):
        with lock.writing(tmp_path, say=print):
            pass
        assert "is being written" in in_another_process(tmp_path)
    assert not (tmp_path / WRITER).exists()


def killed_holder(rank, folder):
    lock.take(Path(folder), say=print)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_taken_over_and_said(tmp_path):
    run_forked(killed_holder, str(tmp_path))
    left, said = lock.holder_of(tmp_path), []
    lock.take(tmp_path, say=said.append)
    assert said == [
        f"{tmp_path} was left by {left}, which did not come to its end: it is taken over"
    ]
    lock.give_back(tmp_path)


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path):
    other = lock.Holder(12, "node7", "another-kernel", "2026-01-02 03:04:05")
    (tmp_path / WRITER).write_text(json.dumps(asdict(other)))
    with pytest.raises(RunFailed, match=rf"process 12 on node7, .* type: rm .*{WRITER}"):
        lock.take(tmp_path, say=print)
    (tmp_path / WRITER).unlink()
    lock.take(tmp_path, say=pytest.fail)
    lock.give_back(tmp_path)


def parent_with_worker(rank, folder):
    """A killed process whose worker lives on with its open files for a moment."""
    import fcntl

    descriptor = os.open(Path(folder, LOCK), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    Path(folder, WRITER).write_text(json.dumps(asdict(lock._this_process())))
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_last_workers_of_a_killed_process_are_waited_for(tmp_path):
    run_forked(parent_with_worker, str(tmp_path))
    said = []
    lock.take(tmp_path, say=said.append)
    assert "it is taken over" in said[0]
    lock.give_back(tmp_path)


def test_a_killed_process_that_still_gives_its_memory_back_is_waited_for(tmp_path, monkeypatch):
    """Until then the system lists it and keeps its lock, and `kill; lbaccel train --resume` is soon
    there: here a process holds it that ends a second later."""
    monkeypatch.setattr(lock, "_DYING_SECONDS", 60.0)
    holding = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(holding, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        said: list[str] = []
        lock.take(tmp_path, say=said.append)
        assert f"left by process {holder.pid}" in said[0]
        lock.give_back(tmp_path)


HOLD = """
import os, sys, time
from pathlib import Path
from lbaccel.runs import lock
lock.take(Path(sys.argv[1]), say=print)
print("held", flush=True)
time.sleep(1)
os._exit(0)
"""


def test_a_folder_that_can_not_be_written_needs_no_lock(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock, "_locked", refuse)
    with lock.writing(tmp_path, say=pytest.fail):
        assert list(tmp_path.iterdir()) == []


# -- the commands ---------------------------------------------------------------------------------


def test_a_second_starter_leaves_a_live_run_alone():
    """With `auto` too: neither is the run taken over, nor does a new one start beside it."""
    folder = stopped_at(3)
    unfinished = folder / "checkpoints" / ".writing-0"
    with lock.writing(folder, say=print):
        unfinished.mkdir()
        for target in ("auto", str(folder)):
            (outcome,) = run_forked(second_starter, target)
            assert outcome.value == 1
    assert unfinished.exists() and len(list(Path("runs").iterdir())) == 1
    assert run("--resume", "auto") == folder
    assert not unfinished.exists() and lock.holder_of(folder) is None


def second_starter(rank, target):
    import tiny  # noqa: F401

    return train.main([*BASE, "--resume", target])


def test_a_run_holds_its_lock_while_it_trains_and_not_after():
    seen = []

    def look():
        (folder,) = Path("runs").iterdir()
        seen.append((lock.holder_of(folder).process, in_another_process(folder)))

    undo = at_update(2, look)
    folder = run("--max-updates", 2)
    undo()
    assert seen[0][0] == os.getpid() and "is being written by" in seen[0][1]
    assert in_another_process(folder) == "taken"


def test_with_several_ranks_the_first_holds_it_and_all_hear():
    folder = stopped_at(3)
    with lock.writing(folder, say=print):
        found = run_forked(second_starter, "auto", world_size=2)
    assert values(found) == [1, 1]
    assert values(run_forked(second_starter, "auto", world_size=2)) == [0, 0]


def test_an_export_into_a_live_run_waits_and_one_elsewhere_only_reads(tmp_path):
    with lock.writing(tmp_path, say=print):
        assert values(run_forked(exporting, str(tmp_path), "export")) == ["RunFailed"]
        assert values(run_forked(exporting, str(tmp_path), "../elsewhere")) == ["done"]


def exporting(rank, folder, target):
    try:
        with export._alone_in(Path(folder), (Path(folder) / target).resolve()):
            return "done"
    except RunFailed as error:
        assert "give another folder with --to" in str(error)
        return "RunFailed"


def test_a_tracker_of_a_loop_of_ones_own_holds_the_lock(tmp_path):
    tracker = RunFolderTracker("mine", run=tmp_path)
    tracker.start()
    assert "is being written" in in_another_process(tmp_path)
    tracker.finish()
    assert in_another_process(tmp_path) == "taken"


# -- which run `auto` takes -----------------------------------------------------------------------


def test_auto_takes_no_copy_of_a_run():
    import shutil

    folder = stopped_at(3)
    for copy in (f"{folder.name}-backup", f"{folder.name}-2", "20990101-000000-copy"):
        shutil.copytree(folder, folder.with_name(copy), symlinks=True)
    assert train.main([*BASE, "--resume", "auto"]) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


def noted(name, made_as):
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    if made_as:
        (folder / "env.json").write_text(json.dumps({"run": made_as}))


def test_a_run_of_the_future_comes_last():
    for name in ("20260102-000000-a", "20990101-000000-a", "20260103-000000-a"):
        noted(name, name)
    found = [path.name for path in own_runs(Path("runs"))]
    assert found == ["20260103-000000-a", "20260102-000000-a", "20990101-000000-a"]


def test_a_run_that_did_not_note_its_name_is_one_and_its_copies_are_guessed():
    for name in ("20260102-000000-a", "20260102-000000-a-2", "20260102-000000-a-backup"):
        noted(name, None)
    found = [path.name for path in own_runs(Path("runs"))]
    assert found == ["20260102-000000-a-2", "20260102-000000-a"]
