"""`--memory` and `--micro-batch-size auto` of the recipe, under real limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import run_fresh
from limited import FLAGS

from lbaccel import train


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_auto_plans_for_the_budget_and_changes_no_result():
    auto, kept, everything = run_fresh(
        "limited",
        "recipes",
        [
            ["--micro-batch-size", "auto", "--memory", "100MiB"],
            ["--micro-batch-size", "256", "--memory", "100MiB"],
            ["--micro-batch-size", "auto", "--activation-checkpointing", "auto"],
        ],
    )
    size = auto[1]["plan"]["micro_batch_size"]
    assert auto[0] == 0 and auto[1]["micro_batch_size"] == "auto"
    assert size % 32 == 0 and 32 <= size < 256  # of whole ghost batches; all 256 do not fit
    # the prediction is kept, to be laid beside the measured peak
    assert 0 < auto[1]["plan"]["predicted_peak_gib"] <= 100 / 1024
    assert "predicted_peak_gib" not in kept[1]["plan"]  # nothing was planned
    # a budget that the plan exceeds is kept by smaller micro-batches
    assert kept[0] == 0 and kept[1]["plan"]["micro_batch_size"] == 256  # what was asked for
    # without one, what is free is the budget, and nothing needs recompute
    assert everything[0] == 0 and everything[1]["plan"]["activation_checkpointing"] == "none"
    assert everything[1]["plan"]["micro_batch_size"] >= size
    for _, _, lines in (auto, kept):
        assert len(lines) == len(everything[2]) == 3  # two updates, one evaluation
        for a, b in zip(lines, everything[2], strict=True):
            # the noise scale's units are the micro-batches
            a, b = ({k: v for k, v in x.items() if k[:6] != "noise/"} for x in (a, b))
            assert a == pytest.approx(b, rel=1e-4)


def test_what_measures_and_draws_takes_none_of_the_trainings_memory():
    # scipy and matplotlib map tens of MiB when they are imported, far more than this run needs on
    # any processor
    growing = "--img-size 8 --batch-schedule bsi --factor 4 --milestones 2 3 --precision fp64"
    growing += " --global-batch-size 128 --epochs 3 --max-updates 100 --micro-batch-size"
    tight, small = run_fresh(
        "limited",
        "recipes",
        [[*growing.split(), "1024", "--memory", "8MiB"], [*growing.split(), "64"]],
    )
    assert small[0] == tight[0] == 0
    updates = [line for line in tight[2] if "batch/global" in line]
    assert [line["batch/global"] for line in updates][-4:] == [512, 512, 414, 1438]
    for a, b in zip(small[2], tight[2], strict=True):
        for key in {"train/loss", "val/loss", "samples_seen", "optim/lr"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory", "8"], "Use a number above 0 and a unit, such as 8GiB"),
        (["--memory=-1GiB"], "is no size"),
        (["--micro-batch-size", "large"], "is not a whole number from 1 to 2^53, or 'auto'"),
        (["--micro-batch-size", "0"], "--micro-batch-size='0' is not a whole number"),
        (["--max-hours", "0"], "--max-hours"),
    ],
)
def test_bad_budgets_are_refused(flags, words, capsys):
    assert train.main([*FLAGS, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()
