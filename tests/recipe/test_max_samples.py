"""--max-train-samples and --max-val-samples in runs: contract, resume, eval, exports."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from judging import make_photos, run_on

from lbaccel import cli, train
from lbaccel.errors import InputError
from lbaccel.product import files
from lbaccel.product.evaluate import evaluate
from lbaccel.recipe.settings import read_settings

LIMITS = ("--max-train-samples", "24", "--max-val-samples", "9")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(files, "draw_confusion", lambda result, path: None)
    monkeypatch.setattr(files, "draw_mistakes", lambda result, path: True)


def judged(run, output, **options):
    """The share of right answers, and the number of images."""
    found = evaluate(run, output=output, **options)
    return found.top1_pct, len(found.outputs.logits)


@pytest.mark.parametrize("own_set", [True, False])
def test_eval_gives_the_run_s_own_number_to_the_bit(own_set, tmp_path):
    data = make_photos(tmp_path / "photos", val=5 if own_set else 0, train=16)
    run = run_on(data, *LIMITS)
    identity = yaml.safe_load((run / "config.yaml").read_text())["data_identity"]
    assert (identity["num_train"], identity["num_val"]) == (24, 9)
    best = json.loads((run / "summary.json").read_text())["best_val_top1"]
    assert judged(run, "own") == (best, 9)

    moved = tmp_path / "moved"
    shutil.move(data, moved)
    named = judged(run, "named", data=f"folder:{moved}")
    assert named == (best, 9), "its own images elsewhere"


def test_other_images_are_judged_whole(tmp_path):
    run = run_on(make_photos(tmp_path / "photos"), *LIMITS)
    other = make_photos(tmp_path / "other", seed=5, val=7)
    said = []
    assert judged(run, "judged", data=f"folder:{other}", say=said.append)[1] == 3 * 7
    assert any("judged on 9 validation images" in line for line in said)
    few = make_photos(tmp_path / "few", seed=6, train=3, val=2)
    assert judged(run, "again", data=f"folder:{few}", say=said.append)[1] == 6


def test_a_resume_takes_the_same_images_and_refuses_another_number(tmp_path, capsys):
    data = make_photos(tmp_path / "photos")
    run = run_on(data, *LIMITS, "--max-updates", "2")
    assert train.main(["--resume", str(run), "--max-updates", "3"]) == 0
    assert train.main(["--resume", str(run), "--max-train-samples", "25"]) == 2
    assert "--max-train-samples 25: the run" in capsys.readouterr().err


def test_two_seeds_train_on_the_same_images(tmp_path):
    data = make_photos(tmp_path / "photos")
    found = []
    for seed in (1, 2):
        run = run_on(data, *LIMITS, "--seed", str(seed), "--max-updates", "1", output=f"runs{seed}")
        found.append(yaml.safe_load((run / "config.yaml").read_text())["data_identity"])
    assert found[0] == found[1]


def test_more_than_there_are_ends_before_a_run(tmp_path, capsys):
    data = make_photos(tmp_path / "photos")
    flags = ["--data", f"folder:{data}", "--model", "lbaccel_tiny", "--max-train-samples", "37"]
    assert train.main(flags) == 2
    assert "there are 36 training images" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_name_of_hugging_face_is_ours():
    assert read_settings(["--max_eval_samples", "9"])[0].data.max_val_samples == 9
    assert read_settings(["--max_train_samples", "9"])[0].data.max_train_samples == 9


def test_an_export_says_what_was_taken(tmp_path):
    run = run_on(make_photos(tmp_path / "photos"), *LIMITS)
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "training images taken, of all there are | 24" in card
    settings = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert settings["max_train_samples"] == 24


def test_a_number_that_is_none_is_refused():
    with pytest.raises(InputError, match="max-train-samples"):
        read_settings(["--max-train-samples", "0"])
