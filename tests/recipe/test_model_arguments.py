"""The network's own arguments, from the command line to a run, its resume, eval and export."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
import yaml
from runs_of_recipe import run
from safetensors.torch import load_file

from lbaccel import cli, network_build, train
from lbaccel.export.read import read_exported
from lbaccel.models import create_backbone
from lbaccel.recipe.experiment import experiment_settings
from lbaccel.recipe.settings import read_settings
from lbaccel.recipe.trained_model import read_trained
from lbaccel.runs.read import load_run

KWARGS = ("--model-kwargs", "stem=8", "widths=(8,16,32)")
FLAGS = ("--model", "cifar_resnet8", *KWARGS, "--zero-init-last", "yes", "--max-updates", "2")
OF_THE_NETWORK = {"stem": 8, "widths": (8, 16, 32), "zero_init_last": True}
FLAGS += ("--drop-rate", "0", "--drop-path", "0", "--checkpoint-every", "1")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return run(*FLAGS, output=tmp_path_factory.mktemp("begun"))


def refused(capsys, *flags):
    assert train.main(["--model", "cifar_resnet8", *flags, "--max-updates", "1"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def network(**others):
    return create_backbone(
        "cifar_resnet8", num_classes=10, num_channels=1, arguments={**OF_THE_NETWORK, **others}
    )


def test_a_run_trains_the_network_that_was_asked_for_and_says_it_everywhere(begun):
    weights = load_file(begun / "checkpoints/last/model.safetensors")
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in network().state_dict().items()
    }
    said = json.loads((begun / "checkpoints/last/preprocessing.json").read_text())["model_kwargs"]
    assert said == {"stem": 8, "widths": [8, 16, 32], "zero_init_last": True}
    config = yaml.safe_load((begun / "config.yaml").read_text())
    assert config["model_kwargs"] == {"stem": 8, "widths": [8, 16, 32]}
    assert config["zero_init_last"] is True
    contract = json.loads((begun / "checkpoints/last/contract.json").read_text())["settings"]
    assert contract["model_kwargs"] == config["model_kwargs"]


def test_yaml_has_a_mapping_and_means_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_kwargs: {stem: 8, widths: [8, 16, 32]}\nzero_init_last: no\n")
    found = read_settings(["--config", str(path)])[0].model
    assert found.model_kwargs == {"stem": 8, "widths": (8, 16, 32)}
    assert found.zero_init_last is False
    assert read_settings(["--config", str(path), "--model-kwargs", "none"])[0].model == (
        read_settings(["--zero-init-last", "no"])[0].model
    )


def test_a_resume_takes_the_same_arguments_and_refuses_others(begun, tmp_path, capsys):
    folder = tmp_path / "runs" / begun.name
    shutil.copytree(begun, folder, symlinks=True)
    for wrong in (["--model-kwargs", "stem=9"], ["--zero-init-last", "no"]):
        assert train.main(["--resume", str(folder), *wrong]) == 2
        text = capsys.readouterr().err
        assert f"{' '.join(wrong)}".replace("no", "False") in text and "can't change it" in text
    goes_on = ["--resume", str(folder), "--model-kwargs", "widths=[8, 16, 32]", "stem=8"]
    assert train.main([*goes_on, "--max-updates", "3"]) == 0
    weights = load_file(folder / "checkpoints/last/model.safetensors")
    assert weights["conv1.weight"].shape[0] == 8


def test_a_checkpoint_and_a_run_are_built_again_with_them(begun):
    for path in (begun, begun / "checkpoints/last"):
        found = read_trained(path)
        assert found.model.conv1.out_channels == 8


def test_a_checkpoint_tries_its_arguments_once(begun, monkeypatch):
    tried = []
    whole = network_build._on_meta
    monkeypatch.setattr(network_build, "_on_meta", lambda *of: tried.append(of) or whole(*of))
    read_trained(begun)
    assert len(tried) == 1


def test_a_checkpoint_without_the_entry_is_one_of_before(tmp_path):
    plain = run("--max-updates", "1", output=tmp_path)
    pre = json.loads((plain / "checkpoints/last/preprocessing.json").read_text())
    assert "model_kwargs" not in pre
    assert read_trained(plain).preprocessing == pre


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"stem": 2**20}, "describes a network of"),
        ({"checkpoint_path": "/etc/passwd"}, "plain arguments of a network"),
        ("stem=8", "plain arguments of a network"),
        ({"stme": 8}, "Did you mean stem?"),
    ],
)
def test_a_forged_entry_is_a_sentence(begun, tmp_path, capsys, entry, words):
    folder = tmp_path / "forged"
    shutil.copytree(begun / "checkpoints/last", folder)
    path, manifest = folder / "preprocessing.json", folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_kwargs": entry}))
    listed = json.loads(manifest.read_text())
    from lbaccel.runs.checkpoints import fingerprint

    listed["files"][path.name] = fingerprint(path)
    manifest.write_text(json.dumps(listed))
    assert cli.main(["eval", str(folder), "--data", "digits"]) == 2
    assert words in capsys.readouterr().err


def test_an_export_has_them_for_timm_and_for_a_new_run(begun, tmp_path):
    assert cli.main(["export", str(begun), "--to", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config["model_args"][k] for k in OF_THE_NETWORK} == {
        **OF_THE_NETWORK,
        "widths": [8, 16, 32],
    }
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours, images = read_trained(begun).model, torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), ours(images))
    assert torch.equal(read_trained(tmp_path / "out").model(images), ours(images))
    again = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert again["model_kwargs"] == {"stem": 8, "widths": [8, 16, 32]}


def test_an_export_with_the_small_stem_is_built_by_the_line_of_its_card(tmp_path):
    flags = ("--model", "resnet10t", "--model-kwargs", "stem_width=16", "--max-updates", "1")
    folder = run(*flags, output=tmp_path)
    exported, _ = read_exported(folder)
    assert exported.small_stem and exported.options["stem_width"] == 16
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert "stem_width=16" in (tmp_path / "out/README.md").read_text()
    images = torch.randn(2, 1, 8, 8)
    found = read_trained(tmp_path / "out").model(images)
    assert torch.equal(found, read_trained(folder).model(images))


def test_a_comparison_has_them_as_one_setting(begun):
    (of,) = experiment_settings([load_run(begun).config])
    assert of["model_kwargs"] == "stem=8 widths=(8,16,32)" and of["zero_init_last"] is True
    assert not [key for key in of if key.startswith("model_kwargs/")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-kwargs", "stme=3"], "Did you mean stem?"),
        (["--model-kwargs", "zero_init_last=no"], "True or False"),
        (["--zero-init-last", "no", "--model-kwargs", "zero_init_last=False"], "Leave one of them"),
        (["--zero-init-last", "no", "--checkpoint", "w.pth"], "take the place"),
        (["--model", "test_vit", "--zero-init-last", "no"], "test_vit has no such argument"),
        (
            ["--model", "test_vit", "--img-size", "32", "--model-kwargs", "global_pool="],
            "a number a class",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(flags, words, capsys):
    assert words in refused(capsys, *flags)


def test_plan_and_verify_build_that_network(capsys):
    def peak(*kwargs):
        flags = ["--global-batch-size", "256", "--memory", "4GiB", "--device", "cpu", "--json"]
        assert cli.main(["plan", "--model", "cifar_resnet8", *flags, *kwargs]) == 0
        return json.loads(capsys.readouterr().out)["predicted_peak_gib"]

    assert peak("--model-kwargs", "stem=4", "widths=(4,8,16)") < 0.5 * peak()
    flags = ["--model", "cifar_resnet8", "--img-size", "8", "--norm-batch-size", "4"]
    assert cli.main(["verify", *flags, "--model-kwargs", "stem=4", "widths=(4,8,16)"]) == 0
    assert "stem=4,\n  widths=(4,8,16)" in capsys.readouterr().out


def test_a_recipe_of_start_types_them_again():
    from lbaccel.data.sources import open_source
    from lbaccel.product.scan import scan
    from lbaccel.product.start import Start

    settings, _ = read_settings(list(FLAGS[:6]))
    start = Start(settings, scan(open_source("digits")))
    assert read_settings(start.flags())[0].model == settings.model
    assert yaml.safe_load(start.yaml())["model_kwargs"] == {"stem": 8, "widths": [8, 16, 32]}
