"""The stable rate that `lbaccel advise` prints: the run's recipe, at its last weights."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from runs_of_recipe import rows, run

from lbaccel import cli
from lbaccel.recipe.settings import read_yaml
from lbaccel.stability.limit import stability_limit
from lbaccel.stability.of_run import RunStability, recipe_of

SMALL = ("--micro-batch-size", "32", "--epochs", "1", "--base-lr", "0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of SGD at 128 samples an update."""
    return run(*SMALL, "--global-batch-size", "128", output=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def set_in(folder, old, new):
    text = (folder / "config.yaml").read_text()
    assert f"\n{text}".count(f"\n{old}\n") == 1
    (folder / "config.yaml").write_text(f"\n{text}".replace(f"\n{old}\n", f"\n{new}\n"))


def advise(folder, *flags):
    assert cli.main(["advise", str(folder), *flags]) == 0


def as_json(folder, capsys):
    capsys.readouterr()
    advise(folder, "--json")
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))


def test_it_is_what_lr_find_measures_from_the_last_weights(finished, tmp_path, capsys):
    found = as_json(finished, capsys)
    weights = finished / "checkpoints" / "last" / "model.safetensors"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(read_yaml(finished / "config.yaml")))
    again = ["--config", str(recipe), "--checkpoint", str(weights), "--num-updates", "5"]
    assert cli.main(["lr-find", *again, "--json"]) == 0
    truth = json.loads(capsys.readouterr().out)["stability"]
    # the micro-batch is another, so the same up to float32's rounding
    for key in ("lambda_max", "num_samples", "momentum", "nesterov", "limit", "stable_rate"):
        assert found["stability"][key] == pytest.approx(truth[key], rel=1e-5)
    assert found["stable_rate"] == found["stability"]["stable_rate"]
    rates = [row["optim/lr"] for row in rows(finished) if "optim/lr" in row]
    assert found["stability"]["peak_lr"] == max(rates)
    assert found["stability"]["last_lr"] == rates[-1] < max(rates)


def test_the_lines_say_how_peak_and_last_rate_stand_to_it(finished, capsys):
    found = as_json(finished, capsys)
    advise(finished)
    said = capsys.readouterr().out.splitlines()
    start = said.index("by the curvature at the run's last weights:")
    assert said[start:] == found["stability_advice"]
    assert said[start + 1].startswith(f"peak lr {found['stability']['peak_lr']:.3g} is ")
    assert f"times the stable rate ({found['stable_rate']:.3g}: limit 1.36" in said[start + 1]
    assert said[start + 2].startswith("last lr ")


def test_the_ratio_is_of_the_rate_and_the_limit():
    found = RunStability(
        lambda_max=2.02,
        residual=0.01,
        num_samples=256,
        momentum=0.9,
        nesterov=False,
        peak_lr=3.2,
        last_lr=3.2,
    )
    # 3.2 x 2.02 / 3.8 = 1.70; one line, as the rate stayed
    assert [line[:40] for line in found.lines()][1] == "last lr 3.2 is 1.7 times the stable rate"
    assert found.stable_rate == pytest.approx(stability_limit(momentum=0.9) / 2.02)
    flat = RunStability(**(vars(found) | {"lambda_max": -1.0}))
    assert flat.to_dict()["stable_rate"] is None
    assert "no positive curvature" in flat.lines()[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--global-batch-size", "auto", "--min-batch-size", "64", "--max-batch-size", "128"),
        ("--global-batch-size", "64", "--batch-schedule", "fast", "--epochs", "2",
         "--milestones", "2", "--first-epoch", "2", "--max-batch-size", "128"),
        ("--global-batch-size", "128", "--base-batch-size", "64", "--lr-scaling", "adascale"),
        ("--global-batch-size", "64", "--batch-schedule", "listed", "--milestones", "2",
         "--batch-sizes", "128", "--lr-factors", "0.5", "--base-lr", "0.05", "--epochs", "2"),
        ("--global-batch-size", "128", "--activation-checkpointing", "full", "--memory", "8GiB"),
        ("--global-batch-size", "128", "--schedule", "multistep", "--milestones", "1"),
    ],
    ids=lambda flags: " ".join(flags[2:4]),
)  # fmt: skip
def test_it_works_for_every_way_in_which_batch_and_rate_may_move(tmp_path, capsys, flags):
    folder = run(*SMALL, *flags, output=tmp_path)
    found = as_json(folder, capsys)
    lines = [row for row in rows(folder) if "optim/lr" in row]
    assert found["stable_rate"] > 0
    assert found["stability"]["peak_lr"] == max(row["optim/lr"] for row in lines)
    # as many as the run's last batch has, up to 256
    assert found["stability"]["num_samples"] == max(row["batch/global"] for row in lines)


def test_the_rates_are_those_of_the_parameters_with_the_highest(tmp_path, capsys):
    folder = run(
        *SMALL,
        "--global-batch-size",
        "128",
        "--head-lr-scale",
        "10",
        "--model",
        "test_resnet",
        "--max-updates",
        "2",
        output=tmp_path,
    )
    found = as_json(folder, capsys)["stability"]
    peak = max(row["optim/lr"] for row in rows(folder) if "optim/lr" in row)
    assert found["peak_lr"] == pytest.approx(10 * peak)


def test_for_other_optimizers_there_is_a_line_and_no_figure(copied, capsys):
    set_in(copied, "optimizer: sgd", "optimizer: adamw")
    found = as_json(copied, capsys)
    assert (found["stable_rate"], found["stability"]) == (None, None)
    assert found["stability_advice"] == ["stable rate: known for SGD, not for adamw"]
    set_in(copied, "optimizer: adamw", "optimizer: sgdw")
    assert as_json(copied, capsys)["stability_advice"] == [
        "stable rate: known for SGD, not for sgdw"
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("data: digits", "data: folder:nothing", "nothing is absent"),
        ("data: digits", "data: parquet:nothing", "nothing"),
        ("model: lbaccel_tiny", "model: resnet18", "does not fit resnet18"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_no_failure(copied, capsys, old, new, says):
    set_in(copied, old, new)
    found = as_json(copied, capsys)
    assert found["stable_rate"] is None
    (line,) = found["stability_advice"]
    assert line.startswith("stable rate: not measured. ") and says in line


@pytest.mark.parametrize("missing", ["checkpoints", "config.yaml"])
def test_a_run_without_weights_or_settings_says_so(copied, capsys, missing):
    path = copied / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (line,) = as_json(copied, capsys)["stability_advice"]
    assert line.startswith("stable rate: not measured. ") and missing in line


def test_quick_builds_nothing_and_imports_no_torch(finished, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lbaccel.stability.of_run", None)  # importing it fails
    advise(finished, "--quick")
    assert "curvature" not in capsys.readouterr().out
    advise(finished, "--quick", "--json")
    assert json.loads(capsys.readouterr().out)["stable_rate"] is None


@pytest.mark.parametrize("stem", ["native", "small"])
def test_the_stem_is_that_of_the_weights_and_nothing_is_downloaded(copied, stem):
    set_in(copied, "pretrained: false", "pretrained: true")
    last = copied / "checkpoints" / "last" / "preprocessing.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"stem": stem}))
    found = SimpleNamespace(**recipe_of(copied, global_batch_size=128).values())
    assert (found.stem, found.pretrained) == (stem, False)
    assert found.checkpoint.endswith("model.safetensors")
