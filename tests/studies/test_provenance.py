"""The line that runs an experiment again: read back, it has the settings of the run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from lbaccel.recipe.experiment import joined
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import ORIGIN, read_settings
from lbaccel.runs.folder import plain
from lbaccel.runs.read import flatten, load_run
from lbaccel.studies.provenance import provenance, reproduce

BEFORE = Path(__file__).parents[1] / "fixtures/before_the_house"


def config_of(flags):
    """The flat settings of a run as its config.yaml has them, with their origins."""
    settings, _ = read_settings(flags)
    origins = {f"{ORIGIN}/{name}": settings.origin(name) for name in OPTIONS}
    text = yaml.safe_dump(plain({**settings.values(), **origins}))
    return flatten(yaml.safe_load(text))  # as `load_run` reads it


def experiment(config):
    config = joined(config)
    return {name: config[name] for name, row in OPTIONS.items() if row.contract or row.length}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--base-lr 0.123456789012 --weight-decay 1e-7 --seed 3 --epochs 2.5",
        "--data 'folder:my photos/$(date)' --mean 0.5 0.25 --std 0.5 0.5 --pretrained",
        "--batch-schedule bsi --factor 2 2 4 --milestones 1 2 3 --epochs 4 --schedule cosine",
        "--batch-schedule bsi --factor 5 --base-lr 0.1 --epochs 4",
        "--norm-batch-size frozen --loss-dropout 1 2 --hflip 0.0 --clip-grad-norm 5 --patience 3",
        "--micro-batch-size 64 --workers 1 --output elsewhere --wandb-name mine --decay-all false",
        "--model cifar_resnet8 --model-kwargs stem=8 'widths=(8,16,32)' zero_init_last=False",
        "--model test_resnet --model-kwargs act=gelu \"block_args={'attn':{'rd':2}}\" tag='8'",
    ],
)
def test_the_line_read_again_has_the_settings_of_the_experiment(flags):
    config = config_of(shlex.split(flags))
    words = shlex.split(reproduce(config))
    assert words[:2] == ["lbaccel", "train"]
    assert experiment(config_of(words[2:])) == experiment(config)


def test_it_has_what_was_given_and_nothing_of_the_machine():
    flags = "--micro-batch-size 64 --workers 1 --output /home/me --wandb-name mine --base-lr 0.2"
    assert reproduce(config_of(shlex.split(flags))) == "lbaccel train --base-lr 0.2"
    # a value that follows from others is derived again
    derived = {
        **config_of(["--img-size", "32"]),
        "num_classes": 10,
        f"{ORIGIN}/num_classes": "default",
    }
    assert reproduce(derived) == "lbaccel train --img-size 32"


def test_a_study_s_file_that_names_defaults_gives_a_short_line(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("mixup: 0.0\nmomentum: 0.9\nbase_lr: 0.3\nseed: 0\n")
    assert reproduce(config_of(["--config", str(file)])) == "lbaccel train --base-lr 0.3"


def test_the_epochs_that_fitted_take_the_place_of_the_minutes():
    config = {"max_minutes": 3.0, f"{ORIGIN}/max_minutes": "flag"}
    config |= {"epochs": 7.5, f"{ORIGIN}/epochs": "default"}
    assert reproduce(config) == "lbaccel train --epochs 7.5"


def test_a_run_of_an_older_version_has_a_line_too():
    run = load_run(BEFORE / "plain/whole")
    words = shlex.split(reproduce(run.config))
    again = experiment(config_of(words[2:]))
    given = [name for name in again if run.config.get(f"origin/{name}") == "flag"]
    assert len(given) > 8
    assert {name: again[name] for name in given} == {name: run.config[name] for name in given}
    found = provenance(run, BEFORE / "plain/whole")
    assert (found["hardware"], found["command"], found["versions"]) == (None, None, {})
    assert found["plan"]["micro_batch_size"] == 64
    assert found["origin"]["mixup"] == "flag" and "momentum" not in found["origin"]


def test_an_extended_run_says_so():
    line = reproduce({"seed": 3, "extensions": [[2.0, "restart"]]})
    assert line.endswith("# this run was extended after that: see config.yaml")
