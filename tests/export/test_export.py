"""A run as a folder for timm and the hub: what it holds, that it loads, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from runs_of_recipe import run as train
from safetensors.torch import load_file

from lbaccel import cli, models
from lbaccel.export import hub
from lbaccel.export.write import FILES
from lbaccel.recipe.settings import read_settings

FLAGS = ("--model", "resnet10t", "--max-updates", "2", "--checkpoint-every", "1")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run on digits: its stem is that for small images."""
    folder = tmp_path_factory.mktemp("adapted")
    return train(*FLAGS, "--ema-decay", "0.9", output=folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same with the network as timm builds it."""
    return train(*FLAGS, "--stem", "native", output=tmp_path_factory.mktemp("plain"))


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def own_network(run, name="best", stem="model"):
    network = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    if "small" in (run / "checkpoints" / name / "preprocessing.json").read_text():
        models.adapt_stem(network)
    network.load_state_dict(load_file(run / "checkpoints" / name / f"{stem}.safetensors"))
    return network.eval()


def test_timm_loads_the_folder_and_gives_the_runs_logits_to_the_bit(plain, tmp_path, capsys):
    assert export(plain, "--to", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(images), own_network(plain)(images))
    pre = json.loads((plain / "checkpoints/best/preprocessing.json").read_text())
    config = timm.data.resolve_model_data_config(loaded)
    assert list(config["mean"]) == pre["mean"] and list(config["std"]) == pre["std"]
    assert config["input_size"] == (1, 8, 8) and config["crop_pct"] == pre["crop_pct"]
    assert loaded.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    by_name = timm.create_model(
        "resnet10t", num_classes=10, in_chans=1,
        checkpoint_path=str(tmp_path / "out/model.safetensors"),
    )  # fmt: skip
    assert torch.equal(by_name.eval()(images), own_network(plain)(images))


def test_another_stem_is_refused_by_plain_timm_and_loads_as_the_card_says(adapted, tmp_path):
    out = tmp_path / "out"
    assert export(adapted, "--to", out) == 0
    for options in ({}, {"num_classes": 3}):  # a new classifier makes timm's loading lenient
        with pytest.raises(RuntimeError, match=r"Unknown model .*adapt_stem"):
            timm.create_model(f"local-dir:{out}", pretrained=True, **options)
    with pytest.raises(RuntimeError, match="needs_lbaccel_models_adapt_stem"):
        timm.create_model("resnet10t", num_classes=10, in_chans=1,
                          checkpoint_path=str(out / "model.safetensors"))  # fmt: skip
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code is not None
    there = code[1].replace("'./", f"'{out}/").replace("Path('", f"Path('{out}/")
    scope: dict = {}
    exec(there, scope)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(scope["model"](images), own_network(adapted)(images))


def test_the_average_and_an_earlier_checkpoint_are_exported_where_asked_for(
    adapted, plain, tmp_path, capsys
):
    for flags, name, stem in (
        (["--ema"], "best", "model_ema"),
        (["--checkpoint", "update_000001"], "update_000001", "model"),
    ):
        out = tmp_path / stem
        assert export(adapted, *flags, "--to", out) == 0
        found = load_file(out / "model.safetensors")
        for key, value in own_network(adapted, name, stem).state_dict().items():
            assert torch.equal(found[key], value)
    assert export(plain, "--ema", "--to", tmp_path / "none") == 2
    assert "the run had no --ema-decay" in capsys.readouterr().err


def test_the_card_has_the_runs_figures_and_nothing_of_the_machine(plain, tmp_path):
    assert export(plain, "--to", tmp_path / "out", "--license", "apache-2.0") == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.library_name, card.data.license) == ("timm", "apache-2.0")
    config = yaml.safe_load((plain / "config.yaml").read_text())
    summary = json.loads((plain / "summary.json").read_text())
    assert config["plan"]["lr"] == 0.1  # 256 samples are the base pair's
    assert "0.1 at the peak = 0.1 x 256 / 256 (rule: linear" in card.text
    assert f"{summary['best_val_top1']:.2f} %" in card.text and "| 2 of 12 |" in card.text
    assert "BatchNorm over | 16 samples" in card.text
    env = json.loads((plain / "env.json").read_text())
    secrets = [str(plain), str(plain.parent), str(Path.home()) + "/"]
    secrets += [env[key] for key in ("hostname", "host", "user") if env.get(key)]
    for name in ("README.md", "config.json", "config.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert not [secret for secret in secrets if secret in text], name


def test_the_exported_settings_are_those_of_the_run_for_the_recipe(plain, tmp_path):
    assert export(plain, "--to", tmp_path / "out") == 0
    settings, _ = read_settings(["--config", str(tmp_path / "out/config.yaml")], prog="x")
    ours = settings.values()
    theirs = yaml.safe_load((plain / "config.yaml").read_text())
    for name in ("model", "global_batch_size", "norm_batch_size", "seed", "stem", "epochs"):
        assert ours[name] == theirs[name], name


def test_nothing_is_overwritten_unasked_and_a_refused_export_keeps_what_was_there(
    plain, tmp_path, capsys
):
    out = tmp_path / "out"
    assert export(plain, "--to", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert export(plain, "--to", out) == 2
    assert "Add --force" in capsys.readouterr().err
    assert export(plain, "--to", out, "--force", "--checkpoint", "update_000009") == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert export(plain, "--to", out, "--force") == 2
    assert "notes.txt, which no export wrote" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert export(plain, "--to", out, "--force", "--checkpoint", "update_000001") == 0
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert list(tmp_path.iterdir()) == [out]  # nothing beside it is left


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run), "there is no such folder"),
        (lambda run: (run / "config.yaml").unlink(), "is no run folder"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint"),
        (
            lambda run: (run / "checkpoints/best/model.safetensors").write_bytes(b"cut off"),
            "it is cut off",
        ),
        (lambda run: (run / "checkpoints/best/manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_a_run_that_is_not_whole_is_refused_by_what_is_wrong(plain, tmp_path, capsys, spoil, words):
    copy = tmp_path / "run"
    shutil.copytree(plain, copy, symlinks=True)
    spoil(copy)
    assert export(copy) == 2
    assert words in capsys.readouterr().err and not (copy / "export").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "newest"], "is not best, best-ema, last or one such as update_000500"),
        (["--private"], "--push-to-hub OWNER/NAME"),
        (["--push-to-hub", "nobody"], "has no owner"),
        (["--license", "my own words"], "no identifier"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(plain, capsys, flags, words):
    assert export(plain, *flags) == 2
    assert words in capsys.readouterr().err and not (plain / "export").exists()


class Api:
    """The hub, as far as an upload sees it."""

    def __init__(self):
        self.calls = []

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options["private"]))

    def model_info(self, repo_id):
        return type("Info", (), {"private": True})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files))
        return type("Done", (), {"commit_url": f"hub:{repo_id}"})


def test_an_upload_is_the_folders_files_and_only_on_request(plain, tmp_path, monkeypatch, capsys):
    api = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert export(plain, "--to", tmp_path / "a") == 0 and not api.calls
    assert export(plain, "--to", tmp_path / "b", "--push-to-hub", "me/net", "--private") == 0
    assert api.calls == [("create", "me/net", True), ("upload", "me/net", sorted(FILES))]
    assert "uploaded: hub:me/net" in capsys.readouterr().out


def test_without_a_login_or_a_network_the_folder_stays_and_says_what_to_type(
    plain, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for offline, words in ((False, "hf auth login"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
        out = tmp_path / str(offline)
        assert export(plain, "--to", out, "--push-to-hub", "me/net") == 1
        assert words in capsys.readouterr().err
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
