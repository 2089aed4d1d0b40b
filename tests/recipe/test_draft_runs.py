"""--decoder draft is of the contract: a run keeps it, and keeps no decoded images beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from runs_of_recipe import check_refused, differences, run, stopped_at

from lbaccel import train

FLAGS = [
    *("--data", "folder:large", "--global-batch-size", "8", "--norm-batch-size", "8"),
    *("--workers", "0", "--epochs", "2", "--img-size", "16"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            folder = Path("large", split, label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
                Image.fromarray(pixels).resize((160, 120)).save(folder / f"{i}.jpg")


def test_a_run_goes_on_with_it_and_another_decoder_is_refused(capsys):
    whole = run(*FLAGS, "--decoder", "draft", output="whole")
    assert "decoder: draft, as fast, and a JPEG much larger" in capsys.readouterr().out
    assert differences(run(*FLAGS, output="plain"), whole), "it decides the result"
    folder = stopped_at(3, *FLAGS, "--decoder", "draft")
    capsys.readouterr()
    for other in ("fast", "pillow"):
        assert train.main(["--resume", str(folder), "--decoder", other]) == 2
        assert f"--decoder {other}: the run in" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--cache-images", "1MiB"]) == 2
    assert "--decoder draft with --cache-images 1MiB" in capsys.readouterr().err
    assert train.main(["--resume", str(folder)]) == 0
    assert differences(folder, whole) == []
    assert yaml.safe_load((folder / "config.yaml").read_text())["decoder"] == "draft"
    for path in folder.glob("checkpoints/update_*/preprocessing.json"):
        assert json.loads(path.read_text())["decoder"] == "draft"


def test_a_run_of_fast_does_not_become_one(capsys):
    folder = stopped_at(3, *FLAGS)
    assert train.main(["--resume", str(folder), "--decoder", "draft"]) == 2
    assert "--decoder draft: the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--cache-images 1MiB", "there is no one image to keep. Leave out --cache-images, or use"),
        ("--auto-augment rand-m9", "--decoder draft with --auto-augment rand-m9: timm's policies"),
    ],
)
def test_pairs_that_can_not_be_are_refused(flags, says, capsys, tmp_path):
    check_refused(f"--data folder:large --decoder draft {flags}", says, capsys, tmp_path)
