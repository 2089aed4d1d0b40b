"""A run that is older than a setting of its data goes on as it began."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image
from runs_of_recipe import differences, run, stopped_at

from lbaccel import train
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.resume import read_run

YOUNGER = ("exif_orientation", "test_split", "decoder")
FLAGS = [
    *("--data", "folder:photos", "--global-batch-size", "8", "--norm-batch-size", "8"),
    *("--workers", "0", "--epochs", "2"),
]
AS_BEFORE = ["--exif-orientation", "false", "--test-split", "val", "--decoder", "pillow"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def photographs():
    """Pictures whose lower half is black once they are upright, in train/ and test/."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for split, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            folder = Path("photos", split, label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((16, 16, 3), np.uint8)
                pixels[:, :8] = 12 * i + (100 if label == "cat" else 0)
                Image.fromarray(pixels).save(folder / f"{i}.png", exif=exif)


def made_older(folder):
    """Take the younger settings out of all that the run says of itself."""
    for name in YOUNGER:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for layer in (config, config["origin"], config["asked"]):
            layer.pop(name, None)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for checkpoint in (folder / "checkpoints").glob("update_*"):
            contract = json.loads((checkpoint / "contract.json").read_text())
            for layer in (contract["settings"], contract["origin"], contract["asked"]):
                layer.pop(name, None)
            (checkpoint / "contract.json").write_text(json.dumps(contract))
            pre = json.loads((checkpoint / "preprocessing.json").read_text())
            pre.pop(name, None)
            (checkpoint / "preprocessing.json").write_text(json.dumps(pre))
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            for file in ("contract.json", "preprocessing.json"):
                content = (checkpoint / file).read_bytes()
                manifest["files"][file]["sha256"] = hashlib.sha256(content).hexdigest()
                manifest["files"][file]["bytes"] = len(content)
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_list_is_the_table_s():
    assert set(YOUNGER) <= {name for name, row in OPTIONS.items() if row.before is not None}


def test_a_run_of_before_goes_on_with_the_images_that_it_began_with(capsys):
    photographs()
    whole = run(*FLAGS, *AS_BEFORE, output="whole")
    other = run(*FLAGS, output="new")
    assert differences(other, whole), "both settings decide the result"
    capsys.readouterr()
    folder = stopped_at(3, *FLAGS, *AS_BEFORE)
    made_older(folder)
    settings = read_run(folder)
    assert settings.data.exif_orientation is False and settings.data.test_split == "val"
    assert settings.data.decoder == settings.data.decoder_used == "pillow"
    assert train.main(["--resume", str(folder)]) == 0
    assert "validation from test/" in capsys.readouterr().out
    assert differences(folder, whole) == []
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["exif_orientation"] is False and config["test_split"] == "val"


def test_a_run_of_before_is_found_again_and_is_not_changed_by_a_flag(capsys):
    photographs()
    folder = stopped_at(2, *FLAGS, *AS_BEFORE)
    made_older(folder)
    assert train.main(["--resume", str(folder), "--exif-orientation"]) == 2
    assert "--exif-orientation True: the run in" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--decoder", "fast"]) == 2
    assert "--decoder fast: the run in" in capsys.readouterr().err
    assert run(*FLAGS, "--resume", "auto") == folder


def test_a_checkpoint_says_whether_its_images_were_turned_and_how_they_were_decoded():
    photographs()
    for flags, turned in (([], True), (AS_BEFORE, False)):
        folder = run(*FLAGS, "--max-updates", "1", *flags, output=f"runs_{turned}")
        (path,) = (folder / "checkpoints").glob("update_*/preprocessing.json")
        said = json.loads(path.read_text())
        assert said["exif_orientation"] is turned
        assert said["decoder"] == ("fast" if turned else "pillow")
