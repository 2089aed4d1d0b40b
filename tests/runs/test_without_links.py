"""A run on a file system that has no symbolic links, such as a mounted Google Drive."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from runs_of_recipe import differences, run, stopped_at

from lbaccel.export.read import checkpoint_of
from lbaccel.recipe.trained_model import read_trained
from lbaccel.runs.folder import follow_link, linked_name, point_link


@pytest.fixture(autouse=True)
def no_links(tmp_path, monkeypatch):
    def refuse(*paths, **options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(paths[-1]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "symlink", refuse)


def test_a_run_is_stopped_resumed_and_read_as_with_links(tmp_path):
    whole = run(output=tmp_path / "whole")
    stopped = stopped_at(5, "--keep", "1", output=tmp_path / "stopped")
    last = stopped / "checkpoints" / "last"
    assert last.is_file() and not last.is_symlink() and last.read_text() == "update_000005\n"
    run("--resume", str(last), "--keep", "1", output=tmp_path / "stopped")
    assert not differences(stopped, whole)
    kept = {path.name for path in (stopped / "checkpoints").iterdir()}
    best = linked_name(stopped / "checkpoints" / "best")
    assert kept == {"last", "best", "update_000012", best}
    assert checkpoint_of(stopped).name == best
    assert checkpoint_of(stopped, "last").name == "update_000012"
    for name in ("", "checkpoints/last", "checkpoints/best"):
        assert read_trained(stopped / name).model is not None


def test_an_older_checkpoint_goes_on_and_best_follows_what_is_put_aside(tmp_path):
    folder = run()
    checkpoints = folder / "checkpoints"
    before = linked_name(checkpoints / "best")
    run("--resume", str(checkpoints / "update_000010"))
    assert linked_name(checkpoints / "last") == "update_000012"
    (aside,) = checkpoints.glob("abandoned-*")
    if before == "update_000012":
        assert linked_name(aside / "best") == before


def test_a_file_leads_to_no_other_place(tmp_path):
    for text in ("../../etc", "update_000001/../..", "", "update_1"):
        (tmp_path / "last").write_text(text)
        assert linked_name(tmp_path / "last") is None
        assert follow_link(tmp_path / "last") == tmp_path / "last"
    point_link(tmp_path / "last", "update_000001")
    point_link(tmp_path / "last", "update_000002")
    assert follow_link(tmp_path / "last") == tmp_path / "update_000002"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["last"]


def test_another_refusal_is_told(tmp_path, monkeypatch):
    def refuse(*paths, **options):
        raise OSError(errno.EACCES, "Permission denied", str(paths[-1]))

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(PermissionError):
        point_link(tmp_path / "last", "update_000001")
