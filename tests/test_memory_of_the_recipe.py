"""`--memory` and `--micro-batch-size auto` of the recipe, in forked children under real limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from forks import run_forked, values
from runs_of_recipe import rows  # registers lbaccel_tiny

from lbaccel import train

# small weights and large activations: libraries keep buffers of the weights' size for each shape
FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "96", "--global-batch-size", "256"),
    *("--max-updates", "2", "--log-with", "run_folder"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def job(rank, *flags):
    code = train.main([*FLAGS, *flags])
    folder = max(Path(flags[-1]).iterdir())
    return code, yaml.safe_load((folder / "config.yaml").read_text()), rows(folder)


def start(*flags, world_size=1):
    return values(run_forked(job, *flags, world_size=world_size))[0]


def test_auto_takes_the_largest_micro_batch_of_the_budget_and_changes_no_result():
    code, config, found = start("--micro-batch-size", "auto", "--memory", "100MiB", "--output", "a")
    size = config["plan"]["micro_batch_size"]
    assert code == 0 and config["micro_batch_size"] == "auto"
    assert size % 32 == 0 and 32 <= size < 256  # of whole ghost batches; all 256 do not fit
    _, given, truth = start("--micro-batch-size", str(size), "--output", "b")
    assert given["micro_batch_size"] == size and len(found) == len(truth)
    for a, b in zip(found, truth, strict=True):  # to the bit, unless the budget was met to the byte
        assert a == pytest.approx(b, rel=1e-4)
    bigger = start("--micro-batch-size", "auto", "--memory", "4GiB", "--output", "c")
    assert bigger[1]["plan"]["micro_batch_size"] == 256


def test_a_budget_that_the_plan_exceeds_is_kept_by_smaller_micro_batches():
    code, config, found = start("--micro-batch-size", "256", "--memory", "100MiB", "--output", "a")
    assert code == 0 and len(found) == 3  # two updates, one evaluation
    assert config["plan"]["micro_batch_size"] == 256  # what was asked for


def test_auto_without_a_budget_takes_what_is_free():
    code, config, _ = start("--micro-batch-size", "auto", "--output", "a")
    assert code == 0 and config["plan"]["micro_batch_size"] == 256


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory", "8"], "Use a number above 0 and a unit, such as 8GiB"),
        (["--memory=-1GiB"], "is no size"),
        (["--micro-batch-size", "large"], "is not a whole number or 'auto'"),
        (["--micro-batch-size", "0"], "micro_batch_size"),
        (["--max-hours", "0"], "--max-hours"),
    ],
)
def test_bad_budgets_are_refused(flags, words, capsys):
    assert train.main([*FLAGS, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()
