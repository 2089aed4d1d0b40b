"""A folder that is written beside and renamed: whole or not there, and the old one until then."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lbaccel.runs.folder import written_beside

FAULTS = (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("x"))


def names(folder):
    """Everything there, hidden files too."""
    return {path.name for path in folder.iterdir()}


def write(target, text):
    with written_beside(target) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("there", [False, True])
def test_a_fault_in_the_middle_leaves_nothing_but_what_was_there(tmp_path, fault, there):
    if there:
        write(tmp_path / "target", "old")
    with pytest.raises(type(fault)), written_beside(tmp_path / "target") as folder:
        (folder / "a").write_text("half")
        raise fault
    assert names(tmp_path) == ({"target"} if there else set())
    if there:
        assert {p.read_text() for p in (tmp_path / "target").iterdir()} == {"old"}


def test_an_empty_folder_and_missing_parents_are_taken_too(tmp_path):
    (tmp_path / "target").mkdir()
    write(tmp_path / "target", "new")
    write(tmp_path / "more" / "deeper" / "target", "new")
    assert names(tmp_path) == {"target", "more"} and names(tmp_path / "more" / "deeper") == {
        "target"
    }
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755  # not a temporary folder's 0700


def test_the_target_holds_the_old_files_or_the_new_ones_and_never_some_of_both(
    tmp_path, monkeypatch
):
    """Seen at each file that is written and at each rename; what is in use elsewhere is hidden."""
    write(tmp_path / "target", "old")
    seen = set()

    def look():
        found = tmp_path / "target"
        if found.exists():
            seen.add(tuple(sorted((p.name, p.read_text()) for p in found.iterdir())))
        assert all(
            n == "target" or n.startswith((".writing-", ".replaced-")) for n in names(tmp_path)
        )

    rename = Path.rename

    def watched(self, target):
        look()
        moved = rename(self, target)
        look()
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    with written_beside(tmp_path / "target") as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")
            look()
    look()
    assert seen == {tuple((n, text) for n in "ab") for text in ("old", "new")}
    assert names(tmp_path) == {"target"}


@pytest.mark.parametrize("fault", FAULTS[:2], ids=lambda fault: type(fault).__name__)
def test_the_old_folder_comes_back_where_the_new_one_can_not_take_its_place(
    tmp_path, monkeypatch, fault
):
    write(tmp_path / "target", "old")
    rename = Path.rename

    def fails(self, target):
        if self.name.startswith(".writing-"):
            raise fault
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(type(fault)):
        write(tmp_path / "target", "new")
    assert names(tmp_path) == {"target"}
    assert {p.read_text() for p in (tmp_path / "target").iterdir()} == {"old"}


def test_the_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("flush"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda p, q: (order.append("rename"), rename(p, q))[1])
    write(tmp_path / "target", "new")
    assert order == ["flush", "flush", "flush", "rename"]  # two files and their folder
