"""The best checkpoint of the weights and the one of their average, which are seldom the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import faults
import pytest
import torch
from forks import run_forked, values
from runs_of_recipe import BASE, differences, newest, run
from safetensors.torch import load_file

from lbaccel import train
from lbaccel.cli import main
from lbaccel.recipe.trained_model import read_trained
from lbaccel.runs.abandoned import put_aside
from lbaccel.runs.checkpoints import fingerprint

# of four evaluations: the weights are best after update 6, their average after update 9
RAW = {3: 10.0, 6: 30.0, 9: 20.0, 12: 5.0}
AVERAGED = {3: 10.0, 6: 20.0, 9: 40.0, 12: 30.0}
EMA = ("--ema-decay", 0.5, "--eval-every", 0.5)


def with_scripted_figures():
    """Let each evaluation give the figures of the two tables; returns what undoes it."""
    plain = train.validate

    def validate(t):
        update = t.large_batch.num_updates
        average = {"val/top1_ema": AVERAGED[update]} if t.ema else {}
        return plain(t) | {"val/top1": RAW[update], **average}

    train.validate = validate
    return lambda: setattr(train, "validate", plain)


@pytest.fixture(autouse=True)
def scripted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    undo = with_scripted_figures()
    yield
    undo()


def links(folder):
    place = folder / "checkpoints"
    return {p.name: p.readlink().name for p in place.iterdir() if p.is_symlink()}


BOTH = {"best": "update_000006", "best-ema": "update_000009", "last": "update_000012"}


def test_the_best_of_each_is_kept_and_named(capsys):
    folder = run(*EMA, "--keep", 1)
    assert links(folder) == BOTH
    assert sorted(p.name for p in (folder / "checkpoints").glob("update_*")) == sorted(
        BOTH.values()
    )
    summary = json.loads((folder / "summary.json").read_text())
    named = {k: v for k, v in summary.items() if k.startswith("best_")}
    assert named == {
        "best_val_top1": 30.0,
        "best_update": 6,
        "best_epoch": 6 * 256 / 1438,
        "best_val_top1_ema": 40.0,
        "best_update_ema": 9,
    }
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "best validation top-1 30.00 % (update 6)" in out
    assert "best validation top-1, EMA 40.00 % (update 9)" in out


def test_without_an_average_there_is_one_best():
    folder = run("--eval-every", 0.5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_update"] == 6 and "best_update_ema" not in summary
    assert links(folder) == {"best": "update_000006", "last": "update_000012"}


def test_eval_predict_and_export_take_the_average_of_its_own_best(tmp_path):
    folder = run(*EMA)
    checkpoints = folder / "checkpoints"
    assert read_trained(folder).update == 6
    found = read_trained(folder, ema=True)
    assert found.update == 9
    assert found.sha256 == fingerprint(checkpoints / "best-ema/model_ema.safetensors")["sha256"]
    for flags, file in (
        ([], "best/model"),
        (["--ema"], "best-ema/model_ema"),
        (["--ema", "--checkpoint", "best"], "best/model_ema"),
        (["--checkpoint", "best-ema"], "best-ema/model"),
    ):
        out = tmp_path / "-".join(["out", *flags])
        assert main(["export", str(folder), "--to", str(out), *flags]) == 0
        truth = load_file(checkpoints / f"{file}.safetensors")
        exported = load_file(out / "model.safetensors")
        assert all(torch.equal(exported[key], value) for key, value in truth.items())
    # a run of before has one best, which holds the average too
    (checkpoints / "best-ema").unlink()
    assert read_trained(folder, ema=True).update == 6


def test_patience_may_wait_for_the_average(monkeypatch):
    for update in (6, 9, 12):
        monkeypatch.setitem(RAW, update, 1.0)
    flags = (*EMA, "--patience", 1)
    summaries = []
    for more in ((), ("--monitor", "val/top1_ema")):
        folder = run(*flags, *more, output=f"runs{len(more)}")
        summaries.append(json.loads((folder / "summary.json").read_text()))
    assert [s["num_updates"] for s in summaries] == [6, 12]
    assert summaries[1]["exit_reason"] == ""  # its fourth evaluation is the last anyway


def job(rank, output, nth):
    if nth:
        faults.install("link", nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with_scripted_figures()
    return train.main([*BASE, *map(str, EMA), "--resume", "auto", "--output", output])


@pytest.mark.parametrize("nth", [8, 11])  # `best-ema` after update 6, beside `best`; and after 9
def test_a_kill_before_the_second_link_loses_nothing(nth):
    (whole,) = run_forked(job, "whole", 0)
    assert whole.exit_code == 0, whole.error
    (killed,) = run_forked(job, "runs", nth)
    assert killed.exit_code == -signal.SIGKILL
    (folder,) = Path("runs").iterdir()
    assert links(folder)["best-ema"] == ("update_000003" if nth == 8 else "update_000006")
    assert links(folder)["best"] == "update_000006"
    assert values(run_forked(job, "runs", 0)) == [0]
    (truth,) = Path("whole").iterdir()
    assert differences(folder, truth) == []
    assert links(folder) == links(truth) == BOTH


def test_a_run_of_before_goes_on_with_its_one_best_as_that_of_the_average(monkeypatch):
    for table in (RAW, AVERAGED):
        for update in (7, 8):
            monkeypatch.setitem(table, update, 1.0)
    folder = run(*EMA, "--max-updates", 7)
    last = newest(folder)
    state = torch.load(last / "state.pt", weights_only=True)
    del state["log"]["best_ema"]
    torch.save(state, last / "state.pt")
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"]["state.pt"] = fingerprint(last / "state.pt")
    (last / "manifest.json").write_text(json.dumps(manifest))
    (folder / "checkpoints/best-ema").unlink()
    run("--resume", folder, *EMA, "--max-updates", 8)
    assert links(folder) == {
        "best": "update_000006",
        "best-ema": "update_000006",
        "last": "update_000008",
    }


def test_both_links_move_aside_with_the_checkpoints_that_a_resume_leaves_behind():
    folder = run(*EMA, "--keep", 20)
    place = folder / "checkpoints"
    put_aside(folder, 8, best=6, best_ema=6, say=lambda _: None)
    assert (place / "abandoned-1/best-ema").readlink() == Path("update_000009")
    assert not (place / "abandoned-1/best").exists()
    assert links(folder) == {
        "best": "update_000006",
        "best-ema": "update_000006",
        "last": "update_000008",
    }
