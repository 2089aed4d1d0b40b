"""The model card and the folder of an export: nothing private, nothing invented, all of it runs."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs_of_recipe import run as train
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

from lbaccel import cli
from lbaccel import train as recipe
from lbaccel.data.sources import open_source
from lbaccel.export import hub, shareable, tables
from lbaccel.export.write import FILES
from lbaccel.models import adapt_stem
from lbaccel.recipe.checks import checked
from lbaccel.recipe.settings import read_settings
from lbaccel.runs.read import Run

NATIVE = ("--model", "resnet10t", "--stem", "native", "--max-updates", "2")


@pytest.fixture(scope="module")
def of_a_person(tmp_path_factory):
    """A ViT at another size than its own, on a folder of images, started by a telling command."""
    home = tmp_path_factory.mktemp("home") / "ms-secret"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for i, name in enumerate(("cat", "dog")):
            (folder := home / "photos" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 128, (40, 48, 3)) + 100 * i * (k % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    flags = [
        *("--data", f"folder:{home}/photos", "--model", "test_vit", "--img-size", "32"),
        *("--global-batch-size", "8", "--epochs", "2", "--max-updates", "3", "--workers", "0"),
        *(f"--output={home}/runs", "--log-with", "run_folder", "wandb"),
        *("--wandb-mode", "disabled", "--wandb-project", "hush"),
        *("--wandb-tags", "hush1", "hush2", "--optimizer", "adamw", "--mixup", "0.2"),
    ]
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [f"{home}/bin/lbaccel", "train", *flags])
    try:
        assert recipe.main(flags) == 0
    finally:
        patch.undo()
    (run,) = (home / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train("--model", "resnet10t", "--max-updates", "6", output=tmp_path_factory.mktemp("d"))


def export(*arguments, code=0):
    assert cli.main(["export", *map(str, arguments)]) == code


def card_of(folder):
    return (folder / "README.md").read_text()


def test_no_path_name_host_or_tracker_of_the_person_is_in_any_file(of_a_person, tmp_path):
    export(of_a_person, "--to", tmp_path / "out")
    words = ["secret", "hush", "wandb", str(tmp_path), str(of_a_person)]
    assert any("secret" in p.read_text() for p in of_a_person.glob("*.yaml"))  # it was there
    assert "secret" in (of_a_person / "env.json").read_text()
    for name in FILES:
        content = (tmp_path / "out" / name).read_bytes()
        assert not [word for word in words if word.encode() in content], name
    for name in ("README.md", "config.json", "config.yaml"):
        text = (tmp_path / "out" / name).read_text()
        for own in (getpass.getuser(), socket.gethostname()):
            assert not re.search(rf"\b{re.escape(own)}\b", text), name
        assert not re.findall(r"(?<![\w/:.])/[A-Za-z_][^\s|]*", text), name  # an absolute path
    assert (
        "```bash\nlbaccel train --data folder:photos --model test_vit --img-size 32 "
        "--global-batch-size 8 --epochs 2 --max-updates 3 --workers 0 --optimizer adamw "
        "--mixup 0.2\n```" in card_of(tmp_path / "out")
    )


def test_the_cards_code_runs_in_the_folder_and_timm_evaluates_as_the_run_did(
    of_a_person, tmp_path, monkeypatch, capsys
):
    export(of_a_person, "--to", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(Path()), re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    model = scope["model"]
    own = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    own.load_state_dict(load_file(of_a_person / "checkpoints/best/model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), own(images))
    photos = ImageFolder(str(of_a_person.parent.parent / "photos/val"), scope["transform"])
    with torch.no_grad():
        hits = [model(image[None]).argmax(1).item() == label for image, label in photos]
    assert len(hits) == 10
    summary = json.loads((of_a_person / "summary.json").read_text())
    assert 100 * sum(hits) / 10 == pytest.approx(summary["best_val_top1"], abs=1e-9)
    by_name = timm.create_model(
        "test_vit", num_classes=2, img_size=32, checkpoint_path="model.safetensors"
    )
    assert torch.equal(by_name.eval()(images), own(images))


@pytest.mark.parametrize("data", ["digits", "folder:photos"])
def test_an_export_of_a_run_of_before_states_nothing_that_a_new_run_refuses(data, tmp_path):
    of_before = {
        "data": data,
        "exif_orientation": False,
        "decoder": "pillow",
        "test_split": "val",
        "ema_norm": "average",
    }
    (tmp_path / "config.yaml").write_text(shareable.settings_yaml(of_before))
    found, _ = read_settings(["--config", str(tmp_path / "config.yaml")], prog="lbaccel train")
    checked(found)
    assert found.data.exif_orientation is (data == "digits")  # the images of digits have no EXIF


def test_a_choice_with_a_slash_is_no_path(tmp_path):
    flags = ("--ema-decay", "0.9", "--monitor", "val/top1_ema", "--patience", "3")
    folder = train(*flags, "--max-updates", "2", output=tmp_path / "runs")
    export(folder, "--to", tmp_path / "out")
    said = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert said["monitor"] == "val/top1_ema"
    line = "lbaccel train --monitor val/top1_ema --data folder:/a/b"
    assert shareable.command(line) == "lbaccel train --monitor val/top1_ema --data folder:b"
    read_settings(["--config", str(tmp_path / "out" / "config.yaml")])


def test_an_export_of_a_run_of_before_states_what_it_had_without_a_name(of_a_person, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(of_a_person, run, symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("exif_orientation", "test_split"):
        del config[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run, "--to", tmp_path / "out")
    said = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (said["exif_orientation"], said["test_split"]) == (False, "val")


def test_the_cards_code_builds_a_network_that_timm_has_not(tmp_path):
    folder = train("--model", "cifar_resnet8", "--max-updates", "2", output=tmp_path / "runs")
    export(folder, "--to", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "out"), re.DOTALL)
    code += "from safetensors.torch import load_file\n"
    code += "own, there = load_file('model.safetensors'), model.state_dict()\n"
    code += "print(len(own), all(torch.equal(own[key], there[key]) for key in there))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert said.stdout.splitlines()[-1:] == ["44 True"], said.stderr


def test_images_in_memory_are_read_whole_so_timm_finds_the_runs_accuracy(digits, tmp_path):
    export(digits, "--checkpoint", "last", "--to", tmp_path / "out")
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1).eval()
    adapt_stem(model)
    timm.models.load_checkpoint(model, str(tmp_path / "out/model.safetensors"))
    config = json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    val = open_source("digits", seed=4).val
    with torch.no_grad():
        images = torch.stack([transform(Image.fromarray(x[0].numpy())) for x in val.images])
        top1 = 100 * (model(images).argmax(1) == val.labels).double().mean().item()
    truth = json.loads((digits / "summary.json").read_text())["val_top1"]
    assert top1 == pytest.approx(truth, abs=1e-9)
    assert f"| **validation top-1 of these weights** | {truth:.2f} % |" in card_of(tmp_path / "out")


def test_the_exported_settings_repeat_the_run(digits, tmp_path, monkeypatch):
    export(digits, "--to", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert recipe.main(["--config", "out/config.yaml", "--log-with", "run_folder"]) == 0
    (again,) = (tmp_path / "runs").iterdir()
    losses = [
        [x["train/loss"] for x in map(json.loads, text.splitlines()) if "train/loss" in x]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (digits, again))
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_what_the_run_folder_does_not_hold_is_left_out(digits, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run, symlinks=True)
    for name in ("summary.json", "metrics.jsonl", "env.json"):
        (run / name).unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["plan"], config["weight_decay"], config["seed"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run)
    assert "the run is not finished (no summary" in capsys.readouterr().out
    card = card_of(run / "export")
    assert "**The run is not finished**" in card
    for word in (
        "## Metrics",
        "## Plan",
        "## Hardware",
        "weight decay",
        "seed",
        "| learning rate",
        "updates |",
        "samples seen",
        "| 0 |",
        "None |",
        "metrics:",
        "license:",
    ):
        assert word not in card, word
    assert "## Contract" in card and "| global batch | 256 samples an update |" in card


def test_an_interrupted_run_is_exported_and_the_card_says_so(digits, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run, symlinks=True)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"status": "failed", "exit_reason": "/home/ms-secret/x can't be read"}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "resumes.jsonl").write_text(
        json.dumps({"update": 3, "world_size": 2, "plan": "4 x 32 x 2 ranks", "command": ["/a"]})
        + "\n"
    )
    export(run)
    card = card_of(run / "export")
    assert "**The run is not finished** (failed)" in card and "ms-secret" not in card
    assert "| resumed after update 3 as | 4 x 32 x 2 ranks |" in card
    assert "note: the run is not finished (failed)" in capsys.readouterr().out


def test_timms_pretrained_weights_are_the_base_model_and_a_files_are_not(digits, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits, run, symlinks=True)
    for checkpoint, base in ((None, "timm/resnet10t.c3_in1k"), ("/home/x/w.pth", None)):
        config = yaml.safe_load((digits / "config.yaml").read_text())
        config |= {"pretrained": True, "checkpoint": checkpoint}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        export(run, "--force")
        data = huggingface_hub.ModelCard.load(run / "export/README.md").data.to_dict()
        assert data.get("base_model") == base and "license" not in data


def test_the_card_says_whether_photographs_were_turned():
    pre = {"img_size": 8, "num_channels": 1, "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
    pre |= {"interpolation": "bicubic"}
    for entry, says in ((True, "upright, as their EXIF entry says"), (False, "as stored")):
        text = tables.data({}, pre | {"exif_orientation": entry}, num_classes=2)
        assert any("photographs" in line and says in line for line in text.splitlines())
    assert "photographs" not in tables.data({}, pre, num_classes=2)  # of before


def test_the_card_names_the_teacher_without_its_folders_and_the_copies_of_an_image():
    config = {"teacher": "/home/me/runs/big", "distill_alpha": 0.7, "distill_temperature": 4.0}
    config |= {"mixup": 0.0, "aug_repeats": 3}
    text = tables.contract(Run("r", config, {}, {}, "folder"))
    assert "| teacher | `big`, alpha 0.7, temperature 4.0 |" in text
    assert "aug_repeats 3" in text
    plain = {"teacher": None, "distill_alpha": 0.5, "mixup": 0.0, "aug_repeats": 1}
    text = tables.contract(Run("r", plain, {}, {}, "folder"))
    assert "teacher" not in text and "aug_repeats" not in text


def test_the_learning_rate_stands_with_its_equation_or_alone():
    config = {
        "plan/lr": 0.001 * math.sqrt(1438 / 256), "base_lr": 0.001, "base_batch_size": 256,
        "lr_scaling": "sqrt", "global_batch_size": 4096,
        "plan/equation": "global batch 1438 = 23 micro-batches",
    }  # fmt: skip
    text = tables.contract(Run("r", config, {}, {}, "folder"))
    lr = 0.001 * math.sqrt(1438 / 256)
    assert f"{lr:.6g} at the peak = 0.001 x sqrt(1438 / 256)" in text
    text = tables.contract(Run("r", config | {"plan/lr": 0.5}, {}, {}, "folder"))
    assert "| learning rate | 0.5 at the peak |" in text
    config |= {"base_batch_size": 512, "global_batch_size": 1438}
    rules = {
        "power": (0.7, " x (1438 / 512)^0.7"),
        "legw": (0.5, " x sqrt(1438 / 512)"),
        "per-512": (1.0, " x 1438 / 512"),
        "none": (0.0, ""),
    }
    for rule, (exponent, shown) in rules.items():
        lr = 0.001 * (1438 / 512) ** exponent
        of_rule = {"lr_scaling": rule, "plan/lr": lr, "warmup": "gradual", "warmup_epochs": 2.0}
        of_rule["lr_exponent"] = 0.7 if rule == "power" else None
        text = tables.contract(Run("r", config | of_rule, {}, {}, "folder"))
        assert f"{lr:.6g} at the peak = 0.001{shown} (rule: {rule};" in text
        assert ("2 epochs at the base batch, times k" in text) == (rule == "legw")


@pytest.mark.parametrize(
    "flags", [("--norm-batch-size", "frozen"), ("--norm-batch-size", "8"), ("--precision", "fp64")]
)
def test_neither_the_kind_of_batch_norm_nor_the_precision_changes_what_timm_loads(flags, tmp_path):
    run = train(*NATIVE, *flags, output=tmp_path / "runs")
    export(run, "--to", tmp_path / "out")
    saved = load_file(run / "checkpoints/best/model.safetensors")
    written = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[k], v) and saved[k].dtype == v.dtype for k, v in written.items())
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    plain = timm.create_model("resnet10t", num_classes=10, in_chans=1).state_dict()
    assert loaded.keys() == plain.keys() == saved.keys()
    assert all(torch.equal(loaded[k], saved[k].to(plain[k].dtype)) for k in saved)
    assert ("stored in float64" in card_of(tmp_path / "out")) == ("fp64" in flags)


def test_deepspeeds_own_checkpoints_are_refused_with_what_joins_them(digits, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(digits, run, symlinks=True)
    best = (run / "checkpoints/best").resolve()
    shutil.rmtree(best)
    (best / "global_step6").mkdir(parents=True)
    (best / "global_step6/zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    for given in (run, best / "global_step6"):
        if given != run:  # by itself it lies in no run
            given = given.rename(tmp_path / "alone")
        export(given, code=2)
        assert "zero_to_fp32.py" in capsys.readouterr().err


def test_weights_are_exported_where_only_the_training_state_is_gone(digits, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits, run, symlinks=True)
    (run / "checkpoints/best/state.pt").unlink()
    export(run)


def test_an_export_comes_back_where_the_new_one_can_not_take_its_place(
    digits, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    export(digits, "--to", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def fails(self, target):
        if self.name.startswith(".writing-"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    export(digits, "--to", out, "--force", "--license", "mit", code=1)
    assert "No space left on device. An earlier export is kept" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


@pytest.mark.parametrize("to", [".", "checkpoints", "checkpoints/update_000099", "config.yaml"])
def test_no_part_of_the_run_is_replaced_even_by_force(digits, to, capsys):
    before = sorted(digits.rglob("*"))
    export(digits, "--to", digits / to, "--force", code=2)
    assert sorted(digits.rglob("*")) == before


def test_a_public_repository_gets_no_private_upload(digits, tmp_path, monkeypatch, capsys):
    class Public:
        def __init__(self, **_): ...
        def create_repo(self, *_, **__): ...
        def model_info(self, _):
            return type("Info", (), {"private": False})

        def upload_folder(self, **_):
            raise AssertionError("uploaded")

    monkeypatch.setattr(huggingface_hub, "HfApi", Public)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    export(digits, "--to", tmp_path / "o", "--push-to-hub", "me/net", "--private", code=1)
    assert "it is public. Nothing was uploaded" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "o").iterdir()} == set(FILES)
    assert "hf_hub_download('me/net', 'model.safetensors')" in card_of(tmp_path / "o")


@pytest.mark.slow
def test_transformers_loads_the_folder_too(of_a_person, tmp_path):
    from transformers import AutoModelForImageClassification

    export(of_a_person, "--to", tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    ours = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).logits, ours(images))
    assert model.config.id2label == {0: "cat", 1: "dog"}
