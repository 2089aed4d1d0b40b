"""Where a trained model may come from, and files that somebody edited."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from judging import CLASSES, photos_and_run
from safetensors.torch import load_file, save_file

from lbaccel import InputError, RunFailed
from lbaccel.cli import main
from lbaccel.recipe import exported
from lbaccel.recipe.trained_model import read_trained


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "it"
    assert main(["export", str(photos_and_run()[1]), "--to", str(folder)]) == 0
    return folder


def edited(export, tmp_path, change):
    """A copy of the export whose config.json was changed."""
    folder = tmp_path / "edited"
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_is_its_best_checkpoint(tmp_path):
    _, folder = photos_and_run()
    best = read_trained(folder / "checkpoints/best")
    found = read_trained(folder)
    assert (found.sha256, found.update, found.run) == (best.sha256, best.update, folder)
    assert best.run == folder
    assert found.classes == tuple(sorted(CLASSES))
    assert not found.model.training


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(architecture="resnet9000"), "is no timm model"),
        (lambda c: c.pop("architecture"), "names no architecture"),
        (lambda c: c.pop("pretrained_cfg"), "has no pretrained_cfg"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3]), r"gives input_size=\[3\]"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 10**9, 8]), "img_size=1000000000"),
        (lambda c: c["pretrained_cfg"].update(mean=[0, 0, "x"]), "gives mean="),
        (lambda c: c["pretrained_cfg"].pop("std"), "has no std"),
        (lambda c: c.update(num_classes=10**9), "num_classes=1000000000"),
        (lambda c: c.update(label_names=list("abcdefgh")), "has 8 label_names for 3 outputs"),
        (lambda c: c.update(label_names=[1, 2, 3]), "gives label_names="),
        (lambda c: c.update(model_args=[1]), "which is no mapping"),
    ],
)
def test_an_export_that_was_edited_ends_in_a_sentence(export, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        read_trained(edited(export, tmp_path, change))


def test_an_export_s_arguments_name_no_other_file(export, tmp_path):
    secret = {"checkpoint_path": "/etc/passwd", "pretrained": True, "num_classes": 7}
    folder = edited(export, tmp_path, lambda c: c.update(model_args=secret))
    found = read_trained(folder)
    assert torch.equal(
        found.model.state_dict()["fc.weight"], load_file(folder / "model.safetensors")["fc.weight"]
    )


def test_weights_of_another_network_are_refused(export, tmp_path):
    folder = edited(export, tmp_path, lambda c: None)
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"] = torch.zeros(3, 9)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"fc\.weight is \(3, 9\)"):
        read_trained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        read_trained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        read_trained(folder)


def test_a_small_stem_is_made_anew(tmp_path):
    from lbaccel import train

    given = ["--model", "resnet10t", "--max-updates", "1", "--log-with", "run_folder"]
    assert train.main([*given, "--output", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert main(["export", str(folder), "--to", str(tmp_path / "it")]) == 0
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        a, b = (read_trained(path).model(images) for path in (folder, tmp_path / "it"))
    assert torch.equal(a, b)


def test_a_model_of_the_hub_is_read_as_its_files_are(export, monkeypatch):
    asked = []

    def fetched(repo_id, file, revision=None):
        asked.append((repo_id, file, revision))
        if file == "config.yaml":
            raise EntryNotFoundError("404")
        return str(export / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    found = read_trained("hf-hub:me/mine@v1")
    assert asked[0] == ("me/mine", "config.json", "v1")
    assert found.classes == tuple(sorted(CLASSES))
    assert found.path == "hf-hub:me/mine@v1"


def test_the_hub_s_answers_are_sentences_without_a_token(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route, hf_abcdefghijkl")

    def empty(*_, **__):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RunFailed, match=r"can't be had: no route, hf_\*\*\*"):
        read_trained("hf-hub:me/mine")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", empty)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_trained("hf-hub:me/mine")
    monkeypatch.undo()
    with pytest.raises(InputError, match="Give hf-hub:OWNER/NAME"):
        read_trained("hf-hub:a/b/c")


def test_imagenet_s_classes_have_their_names():
    import timm

    network = timm.create_model("resnet10t")
    names = exported._usual_names(network)
    assert (len(names), len(set(names)), names[0]) == (1000, 1000, "tench")
    network.num_classes = 12
    assert exported._usual_names(network) == []


def test_other_places_are_refused_with_what_to_type(tmp_path, monkeypatch):
    _, folder = photos_and_run()
    for path, says in (
        (tmp_path / "absent", "does not exist"),
        (folder.parent, f"Give one of the 1 in it, such as {folder}"),
        (folder / "checkpoints/best/model.safetensors", "is a file"),
        (tmp_path, r"holds none of config\.yaml, manifest\.json, config\.json"),
    ):
        with pytest.raises(InputError, match=says):
            read_trained(path)


def test_the_average_of_weights_is_there_or_said_not_to_be(export, tmp_path):
    _, folder = photos_and_run()
    assert read_trained(folder, ema=True).sha256 != read_trained(folder).sha256
    with pytest.raises(InputError, match="holds one set of weights"):
        read_trained(export, ema=True)
    copy = tmp_path / "copy"
    shutil.copytree(folder / "checkpoints/best", copy)
    assert read_trained(copy).run is None
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="is damaged"):
        read_trained(Path(copy))


def test_photographs_are_turned_as_the_run_did(export, tmp_path):
    """A run or an export of before there was the setting took images as they are stored."""
    _, folder = photos_and_run()
    assert read_trained(folder).upright and read_trained(export).upright
    run, old = tmp_path / "run", tmp_path / "old"
    shutil.copytree(folder, run, symlinks=True)
    shutil.copytree(export, old)
    for config in (run / "config.yaml", old / "config.yaml"):
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(x for x in lines if "exif_orientation" not in x))
    assert not read_trained(old).upright
    found = read_trained(run)
    older = {k: v for k, v in found.preprocessing.items() if k != "exif_orientation"}
    assert not replace(found, preprocessing=older).upright
    assert found.upright, "the checkpoint's own word counts"


def test_a_hub_that_is_not_reached_is_no_file_that_is_missing(export, monkeypatch):
    def offline(repo_id, file, revision=None):
        if file == missing:
            raise LocalEntryNotFoundError("offline")
        return str(export / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for missing in ("config.json", "config.yaml"):
        with pytest.raises(RunFailed, match=f"{missing} is not on this machine, and the hub can't"):
            read_trained("hf-hub:me/mine")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"stem_width": 12000, "stem_type": "deep"},
            "describes a network of .* they are not of one",
        ),
        ({"act_layer": "nope"}, "can't be built with .*nope"),
    ],
)
def test_arguments_of_a_foreign_model_take_no_memory(tmp_path, arguments, says):
    network = timm.create_model("resnet10t", num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "model_args": arguments}
    pre = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 1.0}
    config["pretrained_cfg"] = {**pre, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        read_trained(tmp_path)


def test_an_export_of_before_keeps_its_images(export, tmp_path):
    """Its run validated on test/ where there was no val/, and trained on all of train/."""
    old = tmp_path / "old"
    shutil.copytree(export, old)
    assert read_trained(old).settings.data.test_split == "test"
    lines = (old / "config.yaml").read_text().splitlines(keepends=True)
    assert read_trained(old).preprocessing["decoder"] == "fast"
    younger = ("test_split", "exif_orientation", "decoder")
    (old / "config.yaml").write_text("".join(x for x in lines if not x.startswith(younger)))
    older = read_trained(old)
    found = older.settings.data
    assert found.test_split == "val" and found.exif_orientation is False
    assert older.preprocessing["decoder"] == found.decoder == "pillow"
