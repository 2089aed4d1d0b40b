"""A study's numbers are the same from a run's folder and from wandb's offline data of the run."""

from __future__ import annotations

import pytest
from made_studies import make_study
from offline_wandb import WITH_WANDB, fix_tops, keep_to
from runs_of_recipe import run, stopped_at

from lbaccel.recipe.experiment import experiment_settings
from lbaccel.runs.read import load_run
from lbaccel.studies.curves import panels_with, rows_of
from lbaccel.studies.one_run import events, measures, noise


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    keep_to(tmp_path, monkeypatch)


def both(folder):
    return load_run(folder), load_run(folder / "wandb")


def check_equal(folder, study):
    """Every number that a study takes from a run, of both sources; gives those of the folder."""
    of_folder, of_wandb = both(folder)
    assert (of_folder.source, of_wandb.source) == ("folder", "wandb-offline")
    found, theirs = measures(of_folder, study), measures(of_wandb, study)
    assert theirs == found
    for name in panels_with(study.metric):
        each = [one.history[name] for one in (of_wandb, of_folder)]
        first, second = (rows_of(series, range(len(series))) for series in each)
        assert first == second and first
    assert noise(of_wandb) == noise(of_folder)
    assert events(of_wandb, None) == events(of_folder, None)
    assert experiment_settings([of_wandb.config]) == experiment_settings([of_folder.config])
    return found


def test_of_a_run(tmp_path, monkeypatch):
    fix_tops(monkeypatch)  # 50, 80, 60, 70
    study = make_study(tmp_path / "study", last=3, target=75.0)
    found = check_equal(run(*WITH_WANDB), study)
    assert found["value"] == 70.0  # the median of 80, 60, 70
    assert found["reached"]["updates"] == 6
    assert (found["num_updates"], found["samples"]) == (12, 12 * 256)
    assert found["train_value"] is not None and found["seconds"] > 0 and found["num_test"] == 359
    assert found["censored"] is False


def test_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    fix_tops(monkeypatch)
    folder = stopped_at(7, *WITH_WANDB)
    study = make_study(tmp_path / "study", last=3, target=85.0)
    run("--resume", folder, *WITH_WANDB)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    found = check_equal(folder, study)
    assert found["value"] == 70.0
    assert (found["num_updates"], found["reached"], found["censored"]) == (12, None, True)
    (event,) = events(load_run(folder), folder)
    assert (event["kind"], event["update"]) == ("resume", 7)
