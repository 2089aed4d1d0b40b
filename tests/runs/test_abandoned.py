"""A resume from an older update deletes nothing: later checkpoints move, and it says where to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs_of_recipe import newest, rows, run, tensors, whole

from lbaccel import train
from lbaccel.runs.abandoned import put_aside


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def content(folder):
    """The files below a folder, by their name in it."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


def ends_as_the_unbroken_one(folder):
    found, truth = tensors(folder), tensors(whole())
    return found.keys() == truth.keys() and all(torch.equal(found[k], truth[k]) for k in truth)


def test_later_checkpoints_and_the_best_move_aside_and_the_run_ends_as_the_unbroken_one(capsys):
    folder = run("--keep", 20)
    place = folder / "checkpoints"
    (place / "best").unlink()
    (place / "best").symlink_to("update_000012")
    before = {name: content(place / name) for name in ("update_000010", "update_000012")}
    begun = rows(folder)
    capsys.readouterr()
    run("--resume", place / "update_000008", "--max-updates", 9)
    out = capsys.readouterr().out
    aside = place / "abandoned-1"
    assert {name: content(aside / name) for name in before} == before
    assert (aside / "best").readlink() == Path("update_000012")
    assert "moved update_000010, update_000012 to" in out and str(aside) in out
    assert (place / "last").resolve().name == "update_000009"
    lost = (folder / "metrics_abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lost] == [
        row["update"] for row in begun if row["update"] > 8
    ]
    assert f"{len(lost)} lines of metrics.jsonl after update 8 moved to" in out
    run("--resume", folder, "--max-updates", 100)
    assert ends_as_the_unbroken_one(folder)
    assert content(aside / "update_000012") == before["update_000012"]
    run("--resume", place / "update_000004")
    assert sorted(p.name for p in place.glob("abandoned-*")) == ["abandoned-1", "abandoned-2"]
    assert ends_as_the_unbroken_one(folder)


def test_best_names_the_best_update_so_far_again():
    folder = run("--keep", 20, "--eval-every", 0.5)
    place = folder / "checkpoints"
    (place / "best").unlink()
    (place / "best").symlink_to("update_000012")
    best = json.loads((folder / "summary.json").read_text())["best_update"]
    put_aside(folder, 10, best=4, say=lambda _: None)
    assert (place / "best").readlink() == Path("update_000004") and best
    assert (place / "last").readlink() == Path("update_000010")
    assert (place / "abandoned-1" / "best").readlink() == Path("update_000012")


def test_a_refused_newest_checkpoint_keeps_its_good_weights(capsys):
    folder = run("--max-updates", 5)
    (newest(folder) / "state.pt").write_bytes(b"damaged")
    weights = (newest(folder) / "model.safetensors").read_bytes()
    capsys.readouterr()
    run("--resume", folder, "--max-updates", 100)
    out = capsys.readouterr().out
    kept = folder / "checkpoints" / "abandoned-1" / "update_000005" / "model.safetensors"
    assert kept.read_bytes() == weights
    assert "refused update_000005" in out and "moved update_000005 to" in out
    assert ends_as_the_unbroken_one(folder)


def test_a_resume_from_the_newest_makes_no_folder_and_keeps_the_lines_of_lost_updates():
    folder = run("--max-updates", 4)
    line = '{"update": 5, "train/loss": 1.0}'
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + '{"update": 6, "train/lo')
    run("--resume", folder, "--max-updates", 100)
    assert not list((folder / "checkpoints").glob("abandoned*"))
    kept = (folder / "metrics_abandoned.jsonl").read_text().splitlines()
    assert kept == [line, '{"update": 6, "train/lo']
    assert ends_as_the_unbroken_one(folder)


def test_a_checkpoint_that_a_kill_left_between_two_renames_is_kept():
    folder = run("--max-updates", 4)
    place = folder / "checkpoints"
    old = place / ".replaced-abc"
    (place / "update_000004").rename(old)
    part = place / ".writing-abc"
    part.mkdir()
    before = content(old)
    (place / "last").unlink()
    put_aside(folder, 2, best=None, say=lambda _: None)
    assert content(place / "abandoned-1" / "update_000004") == before
    assert not part.exists() and not old.exists()


def test_a_resume_that_is_refused_moves_nothing(capsys):
    folder = run("--keep", 20)
    before = content(folder)
    older = folder / "checkpoints" / "update_000004"
    assert train.main(["--resume", str(older), "--base-lr", "0.3"]) == 2
    assert content(folder) == before
