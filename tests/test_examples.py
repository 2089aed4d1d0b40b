"""The examples run; the two scripts differ by about ten lines."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from lbaccel import train

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore:global_batch_size=4096 is above the training set")
@pytest.mark.parametrize("name", ["finetune_accelerate.py", "finetune_lbaccel.py"])
def test_an_example_trains_on_a_folder_of_images(name, tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv2_035").state_dict(), weights)
    flags = ["--model", "mobilenetv2_035", "--weights", weights, "--epochs", 1, "--workers", 0]
    flags += ["--micro-batch-size", 4]
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *map(str, flags)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "epoch 0: loss" in capsys.readouterr().out


def test_about_ten_lines_of_code_are_new():
    plain, ours = (
        (EXAMPLES / name).read_text().split('"""', 2)[2].splitlines()
        for name in ("finetune_accelerate.py", "finetune_lbaccel.py")
    )
    new = [
        line for line in difflib.ndiff(plain, ours) if line.startswith("+ ") and line[2:].strip()
    ]
    assert len(new) <= 13, "\n".join(new)


@pytest.mark.filterwarnings("ignore:global_batch_size=256 is above the training set")
@pytest.mark.parametrize("name", ["simclr", "clip"])
def test_a_contrastive_example_and_its_twin_train_and_differ_by_some_twenty_lines(
    name, monkeypatch, capsys
):
    twins = [f"{name}_accelerate.py", f"{name}.py"]
    for script in twins:
        flags = ["--samples", "128", "--epochs", "1", "--micro-batch-size", "32"]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        assert "epoch 0: loss" in capsys.readouterr().out
    plain, ours = (
        (EXAMPLES / script).read_text().split('"""', 2)[2].splitlines() for script in twins
    )
    new = [
        line for line in difflib.ndiff(plain, ours) if line.startswith("+ ") and line[2:].strip()
    ]
    assert len(new) <= 18, "\n".join(new)


def test_the_first_run_of_the_readme_warns_of_nothing(tmp_path, monkeypatch, capsys):
    """Its batch is small enough for its data, and its updates are many enough."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(EXAMPLES / "digits.yaml"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "global batch 96 = 3 micro-batches x 32 samples x 1 rank" in out
    assert "warning" not in out + err


def test_ci_runs_the_commands_of_the_readme():
    top = EXAMPLES.parent
    lines = (top / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("pip install ")]
    ran = (top / ".ci/run").read_text().replace(" -q", "")
    for command in commands[:2]:  # the demonstration and the tests
        assert all(part in ran for part in command.split(" && "))
