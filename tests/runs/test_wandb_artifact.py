"""`--wandb-artifacts`: a checkpoint as wandb's artifact, read back out of its offline log."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from offline_wandb import WITH_WANDB, fix_tops, keep_to
from runs_of_recipe import BASE, run, stopped_at
from safetensors.torch import load_file

from lbaccel import train
from lbaccel.recipe.trained_model import read_trained
from lbaccel.runs import wandb_artifact
from lbaccel.runs.read import _inspect


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    keep_to(tmp_path, monkeypatch)


@pytest.fixture
def tops(monkeypatch):
    return fix_tops(monkeypatch)


def artifacts(folder):
    """Of each start of the run the artifacts in its log."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [[r["artifact"] for r in _inspect(file) if "artifact" in r] for file in files]


def files_of(artifact):
    """Name to the file that `wandb sync` will upload."""
    return {one["path"]: Path(one["local_path"]) for one in artifact["manifest"]["contents"]}


@pytest.mark.parametrize(("which", "update", "top1"), [("best", 6, 80.0), ("last", 12, 70.0)])
def test_it_holds_what_the_model_needs_and_no_optimizer_state(tops, which, update, top1):
    folder = run(*WITH_WANDB, "--wandb-artifacts", which)
    ((artifact,),) = artifacts(folder)
    assert (artifact["name"], artifact["type"]) == (folder.name, "model")
    assert set(artifact["aliases"]) == {"latest", which}
    known = json.loads(artifact["metadata"])
    assert (known["update"], known["val/top1"], known["model"]) == (update, top1, "lbaccel_tiny")
    assert known["epoch"] == pytest.approx(update * 256 / 1438)
    assert known["classes"] == [str(digit) for digit in range(10)]
    files = files_of(artifact)
    assert set(files) == {
        "model.safetensors", "classes.json", "preprocessing.json", "manifest.json",
    }  # fmt: skip
    (start,) = (folder / "wandb").glob("offline-run-*")
    assert all(file.is_relative_to(start.absolute()) for file in files.values())
    saved = folder / "checkpoints" / which
    for name, file in files.items():
        assert file.read_bytes() == (saved / name).read_bytes()


def test_the_downloaded_folder_is_a_model_that_predicts(tops, tmp_path):
    folder = run(*WITH_WANDB, "--wandb-artifacts", "best", "--ema-decay", 0.5)
    ((artifact,),) = artifacts(folder)
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, file in files_of(artifact).items():
        shutil.copyfile(file, downloaded / name)
    for ema, stem in ((False, "model"), (True, "model_ema")):
        trained = read_trained(downloaded, ema=ema)
        assert (trained.update, trained.num_named) == (6, 10)
        saved = load_file(folder / "checkpoints" / "best" / f"{stem}.safetensors")
        own = trained.model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in saved.items())


def test_a_checkpoint_that_a_resume_deletes_stays_in_the_log_of_its_start(tops, monkeypatch):
    flags = (*WITH_WANDB, "--wandb-artifacts", "last", "--keep", 1)
    folder = run(*flags, "--max-updates", 3)
    run(*flags, "--resume", folder, "--max-updates", 12)
    (first,), (second,) = artifacts(folder)
    assert json.loads(first["metadata"])["update"] == 3
    assert not (folder / "checkpoints" / "update_000003").exists()
    assert all(file.is_file() for file in files_of(first).values())
    assert json.loads(second["metadata"])["update"] == 12


def test_a_file_system_without_hard_links_gets_copies(tops, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = run(*WITH_WANDB, "--wandb-artifacts", "best")
    ((artifact,),) = artifacts(folder)
    assert files_of(artifact)["model.safetensors"].stat().st_nlink == 1


def test_an_interrupt_waits_for_no_upload_and_the_resume_does_it(tops):
    folder = stopped_at(8, *WITH_WANDB, "--wandb-artifacts", "best")
    assert artifacts(folder) == [[]]
    run("--log-with", "run_folder", "wandb", "--resume", folder)
    first, second = artifacts(folder)
    assert first == [] and len(second) == 1


def test_by_default_there_is_none(tops):
    assert artifacts(run(*WITH_WANDB)) == [[]]


def test_one_that_can_not_be_logged_is_a_note(tops, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb_artifact, "_beside", full)
    folder = run(*WITH_WANDB, "--wandb-artifacts", "best")
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    out = capsys.readouterr().out
    assert "/checkpoints/best was not logged as wandb's artifact (OSError" in out
    assert "The run is whole without it." in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--log-with", "run_folder"),
            "--log-with run_folder does not read --wandb-artifacts best. Use",
        ),
        ((*WITH_WANDB, "--wandb-mode", "disabled"), "--wandb-mode disabled logs nothing, so there"),
        (("--log-with", "wandb"), "WANDB_MODE=disabled logs nothing, so there would be no artif"),
    ],
)
def test_where_wandb_logs_nothing_it_is_refused(flags, says, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    given = [*BASE, *map(str, flags), "--wandb-artifacts", "best"]
    assert train.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not Path("runs").exists()
