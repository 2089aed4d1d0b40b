"""Checkpoints: whole or not there, the newest ones kept, and the last one safe on a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lbaccel.errors import CannotRead, RunFailed
from lbaccel.runs.checkpoints import check_checkpoint, latest_good, read_state, save_checkpoint

CLASSES = ("cat", "dog")


def save(folder, update, *, value=None, size=4, **options):
    weights = {"model": {"w": torch.full((size,), float(update if value is None else value))}}
    return save_checkpoint(
        folder, update=update, weights=weights, classes=CLASSES,
        preprocessing={"img_size": 8, "mean": (0.5,)}, **options,
    )  # fmt: skip


def value_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")["w"][0].item()


def names(folder):
    """Everything there, hidden files too."""
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_holds_weights_classes_and_preprocessing(tmp_path):
    path = save(tmp_path, 3)
    files = {"model.safetensors", "classes.json", "preprocessing.json"}
    assert names(path) == files | {"manifest.json"}
    assert json.loads((path / "classes.json").read_text()) == ["cat", "dog"]
    assert json.loads((path / "preprocessing.json").read_text()) == {"img_size": 8, "mean": [0.5]}
    assert names(tmp_path) == {"update_000003", "last"} and value_of(tmp_path / "last") == 3
    assert path.stat().st_mode & 0o777 == 0o755  # not the 0700 of a temporary folder


def test_views_and_tensors_of_another_layout_are_stored_as_they_read(tmp_path):
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weights = {"model": {"a": images.to(memory_format=torch.channels_last), "b": images[0].mT}}
    path = save_checkpoint(tmp_path, update=1, weights=weights, classes=(), preprocessing={})
    found = safetensors.torch.load_file(path / "model.safetensors")
    assert torch.equal(found["a"], images) and torch.equal(found["b"], images[0].mT)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_ones_and_the_best_one_stay(tmp_path, keep):
    for update in range(1, 7):
        save(tmp_path, update, best=update == 2, keep=keep)
    newest = {f"update_{update:06d}" for update in range(7 - keep, 7)}
    assert names(tmp_path) == {"last", "best", "update_000002"} | newest
    assert value_of(tmp_path / "last") == 6 and value_of(tmp_path / "best") == 2


def test_a_new_best_frees_the_old_one(tmp_path):
    for update in range(1, 5):
        save(tmp_path, update, best=update in (1, 3))
    assert names(tmp_path) == {"last", "best", "update_000003", "update_000004"}


def test_updates_above_a_million_are_kept_in_the_order_of_their_number(tmp_path):
    for update in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, update, keep=2)
    assert names(tmp_path) == {"last", "update_1000000", "update_1000001"}


def test_links_are_relative_so_that_a_run_folder_can_be_moved(tmp_path):
    save(tmp_path / "a", 1, best=True)
    (tmp_path / "a").rename(tmp_path / "b")
    assert value_of(tmp_path / "b/last") == value_of(tmp_path / "b/best") == 1


def test_the_links_turn_after_the_folder_is_whole(tmp_path, monkeypatch):
    """At each moment `last` names a whole checkpoint: seen from inside the writing of the next."""
    save(tmp_path, 1)
    seen, plain = [], safetensors.torch.save_file

    def spy(tensors, path):
        seen.append((value_of(tmp_path / "last"), Path(path).parent.name))
        plain(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", spy)
    save(tmp_path, 2)
    ((value, folder),) = seen
    assert value == 1 and folder.startswith(".") and value_of(tmp_path / "last") == 2


@pytest.mark.parametrize("when", ["model", "classes.json", "link"])
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, when):
    save(tmp_path, 1, best=True)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "model":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    elif when == "classes.json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(RunFailed) as caught:
        save(tmp_path, 2, best=True)
    monkeypatch.undo()
    text = str(caught.value)
    for word in ("update 2 could not be saved", "No space left", "update_000001 is kept"):
        assert word in text
    assert "Free some space" in text
    assert value_of(tmp_path / "last") == value_of(tmp_path / "best") == 1
    assert names(tmp_path) - {"update_000002"} == {"last", "best", "update_000001"}


def test_a_real_limit_on_the_size_of_files_keeps_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1, size=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))  # python ignores SIGXFSZ
    try:
        with pytest.raises(RunFailed, match="update_000001 is kept"):
            save(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == {"last", "update_000001"}
    assert safetensors.torch.load_file(tmp_path / "last/model.safetensors")["w"].sum() == 100_000


def test_an_interrupt_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path) == {"last", "update_000001"} and value_of(tmp_path / "last") == 1


def test_the_first_save_that_fails_says_that_there_was_none_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="there was none before"):
        save(tmp_path / "file", 1)


def test_saving_an_update_again_replaces_it_whole(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "update_000001" / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 1, value=9, best=True)
    assert value_of(tmp_path / "best") == 9
    assert names(tmp_path) == {"last", "best", "update_000001"}


def test_a_manifest_holds_size_and_sha256_of_each_file(tmp_path):
    path = save(tmp_path, 1, state={"a": torch.ones(2), "b": [1, 2.5, "x", None]})
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() == names(path) - {"manifest.json"}
    for name, entry in files.items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    check_checkpoint(path)
    state = read_state(path)
    assert torch.equal(state["a"], torch.ones(2)) and state["b"] == [1, 2.5, "x", None]


def test_files_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda d: (events.append("flush"), fsync(d)))
    monkeypatch.setattr(Path, "rename", lambda *a: (events.append("rename"), rename(*a))[1])
    path = save(tmp_path, 1)
    assert events == ["flush"] * (len(names(path)) + 1) + ["rename"]  # the files and their folder


def test_a_checkpoint_that_can_not_be_read_stops_a_resume_and_is_not_passed_over(
    tmp_path, monkeypatch
):
    """It may be whole: a run that goes on from an older one takes the newer one away."""
    for update in (1, 2):
        save(tmp_path, update, state={"counters": {}})
    plain = Path.open

    def defective(self, mode="r", *rest, **options):
        if self.parent.name == "update_000002" and mode == "rb":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return plain(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", defective)
    said = []
    with pytest.raises(CannotRead, match=r"update_000002/.* can't be read: Input/output error"):
        latest_good(tmp_path, said.append)
    assert said == []


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "Free some space, or give another --output."),
        (errno.EACCES, "Make the place readable and writable, or give another --output."),
    ],
)
def test_the_way_out_fits_the_disk_s_reason(tmp_path, monkeypatch, number, words):
    def refuses(*_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "write_text", refuses)
    with pytest.raises(RunFailed) as caught:
        save(tmp_path, 1)
    assert str(caught.value).endswith(words)
    assert names(tmp_path) == set()
