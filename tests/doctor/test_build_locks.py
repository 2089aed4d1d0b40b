from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import STARTER, environment
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from lbaccel.doctor.build_locks import check_build_locks, stale_locks
from lbaccel.errors import InputError

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(10_000)
"""

AS_IN_2_6 = """
from torch.utils import cpp_extension, file_baton
cpp_extension.FileBaton = file_baton.FileBaton
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The path of an operator's lock in a folder of extensions; it does not exist."""
    monkeypatch.setattr(cpp_extension, "FileBaton", FileBaton, raising=False)  # as in torch 2.6
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built ones"))
    path = tmp_path / "built ones" / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    return path


@contextlib.contextmanager
def build_of(lock):
    """A process that builds; killed at the end, as an impatient user does."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "building\n"
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_a_killed_build_is_stale_and_that_of_a_live_one_is_not(lock):
    assert stale_locks() == []
    with build_of(lock):
        assert stale_locks() == [] and lock.exists()
    assert stale_locks() == [lock]
    lock.unlink()
    assert stale_locks() == [] and FileBaton(str(lock)).try_acquire()


def test_torchs_own_folder_is_looked_at_where_no_variable_names_one(lock, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from torch.utils.cpp_extension import _get_build_directory

    theirs = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    theirs.touch()
    assert stale_locks() == [theirs]


def test_a_start_that_needs_it_stops_and_another_one_warns(lock):
    assert check_build_locks(["cpu_adam"]) is None
    lock.touch()
    with pytest.raises(InputError, match=f"no other host or container .* type: rm '{lock}'"):
        check_build_locks(["cpu_adam"])
    assert f"does not need. If no other host or container builds there now: rm '{lock}'" in (
        check_build_locks(["deepspeed_shm_comm"]) or ""
    )


def test_a_file_that_later_versions_of_torch_leave_blocks_nothing(lock, monkeypatch):
    lock.touch()
    assert stale_locks() == [lock]
    monkeypatch.delattr(cpp_extension, "FileBaton")  # a lock of the system is in its place
    assert stale_locks() == [] and check_build_locks(["cpu_adam"]) is None


@pytest.mark.slow
def test_a_deepspeed_start_says_it_before_it_waits(lock, tmp_path):
    blocking = lock.parent.parent / "deepspeed_shm_comm" / "lock"
    blocking.parent.mkdir()
    blocking.touch()
    flags = ["--model", "lbaccel_tiny", "--global-batch-size", "64", "--output", "runs"]
    found = subprocess.run(
        [sys.executable, "-c", AS_IN_2_6 + STARTER, "train", *flags],
        cwd=tmp_path,
        env=environment(ACCELERATE_USE_DEEPSPEED="true"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 2
    last = found.stderr.splitlines()[-1]
    assert last.startswith("error: a killed build left the lock of deepspeed_shm_comm")
    assert last.endswith(f"type: rm '{blocking}'")
    assert not (tmp_path / "runs").exists()


def test_doctor_names_it_and_the_line_to_type(lock, capsys):
    from lbaccel.cli import main

    lock.touch()
    main(["doctor"])
    out = capsys.readouterr().out
    assert "stale-build-lock" in out and f"type: rm '{lock}'" in out
