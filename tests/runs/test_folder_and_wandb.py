"""A run of the recipe is the same one in its folder and in wandb's offline data, by each metric."""

from __future__ import annotations

import math

import pytest
from offline_wandb import WITH_WANDB, keep_to
from runs_of_recipe import run

from lbaccel.recipe.experiment import experiment_settings
from lbaccel.recipe.options import OPTIONS
from lbaccel.runs.read import _inspect, load_run

STUDY = ("--wandb-group", "goyal cifar", "--wandb-tags", "arm-linear", "batch-256")
OF_THE_RUN = ("--noise-scale", "plain", "--ema-decay", "0.9", "--clip-grad-norm", "1")

NETWORK = ("--model", "cifar_resnet8", "--model-kwargs", "stem=4", "widths=(4,8,16)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        keep_to(tmp_path_factory.mktemp("both"), patch)
        yield run(*WITH_WANDB, *STUDY, *OF_THE_RUN, *NETWORK)


def test_each_metric_is_the_same_series_in_both(folder):
    ours, theirs = load_run(folder), load_run(folder / "wandb")
    assert (ours.source, theirs.source) == ("folder", "wandb-offline")
    assert ours.history.keys() == theirs.history.keys()
    for name, series in ours.history.items():
        assert theirs.history[name] == series, name
    wanted = {"train/loss", "train/top1", "val/top1", "val/loss", "val/top1_ema", "optim/lr"}
    noise = {"noise/critical_batch_size", "noise/scale_s", "noise/low", "noise/high"}
    assert wanted | noise <= ours.history.keys(), sorted(ours.history)
    tops = [point.value for point in ours.history["train/top1"]]
    assert tops and all(0 <= top <= 100 and math.isfinite(top) for top in tops)


def test_the_settings_and_the_study_are_the_same_in_both(folder):
    ours, theirs = load_run(folder), load_run(folder / "wandb")
    # the folder alone has the origin of each value; some settings are of one start of the run
    of_a_start = {name for name, row in OPTIONS.items() if not row.of_run}
    by_folder, by_wandb = (
        {k: v for k, v in one.items() if not k.startswith("origin/") and k not in of_a_start}
        for one in (ours.config, theirs.config)
    )
    assert by_folder == by_wandb and set(OPTIONS) - of_a_start - {"model_kwargs"} <= set(by_folder)
    assert ours.config["model_kwargs/widths"] == [4, 8, 16]
    assert experiment_settings([ours.config]) == experiment_settings([theirs.config])
    assert ours.name == theirs.name
    assert ours.config["wandb_group"] == "goyal cifar"
    assert ours.config["wandb_tags"] == ["arm-linear", "batch-256"]
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    (of_wandb,) = [record["run"] for record in _inspect(file) if "run" in record]
    assert of_wandb["run_group"] == ours.config["wandb_group"]
    assert of_wandb["tags"] == ours.config["wandb_tags"]
