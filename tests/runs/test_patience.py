"""--patience: a run ends in good order where its evaluations get no better, on all ranks alike."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from forks import run_forked, values
from runs_of_recipe import BASE, at_update, differences, interrupt, newest, rows, run, stopped_at

from lbaccel import train
from lbaccel.runs.patience import Patience

# Nothing is learned, so the first of four evaluations (updates 3, 6, 9 and 12) is the best one.
STILL = ("--base-lr", 1e-12, "--norm-batch-size", "frozen", "--eval-every", 0.5)
ENDS_AT = 9


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("monitor", "series", "ends"),
    [
        ("val/top1", [1, 2, 2, 1], [False, False, False, True]),
        ("val/top1", [1, 2, 2, 3, 2], [False] * 5),
        ("val/loss", [2, 1, 1.5, 1], [False, False, False, True]),
        ("val/loss", [2, 1.5, 1, 0.5, 0.2], [False] * 5),
        ("val/loss", [math.nan, math.nan], [False, True]),
        ("val/loss_ema", [1, math.nan, 2], [False, False, True]),
    ],
)
def test_two_evaluations_without_a_better_one_are_the_end(monitor, series, ends):
    patience = Patience(2, monitor)
    assert [patience.after_evaluation({monitor: value}) for value in series] == ends


def test_without_a_number_nothing_ends_but_is_counted():
    patience = Patience(None)
    assert not any(patience.after_evaluation({"val/top1": 1.0}) for _ in range(9))
    assert patience.waited == 8


def test_a_state_of_another_metric_starts_afresh():
    before = Patience(3, "val/top1", best=50.0, waited=2)
    same, other = Patience(3, "val/top1"), Patience(3, "val/loss")
    for patience in (same, other):
        patience.load_state_dict(before.state_dict())
    assert (same.best, same.waited, other.best, other.waited) == (50.0, 2, None, 0)


def test_a_run_that_gets_no_better_ends_as_a_finished_one(capsys):
    folder = run(*STILL, "--patience", 2, "--log-every", 5)
    summary = summary_of(folder)
    assert (summary["status"], summary["num_updates"]) == ("done", ENDS_AT)
    why = "stopped early: 2 evaluations without a better val/top1 than "
    assert summary["exit_reason"].startswith(why) and why in capsys.readouterr().out
    assert newest(folder).name == f"update_{ENDS_AT:06d}"
    lines = [row["update"] for row in rows(folder) if "train/loss" in row]
    assert lines == [5, ENDS_AT]  # the last update is in a line though 5 does not divide it
    assert (folder / "plots" / "loss.png").exists()


def test_it_ends_where_it_would_have_after_a_resume_and_is_done_then(capsys):
    truth = run(*STILL, "--patience", 2, output="whole")
    folder = stopped_at(5, *STILL, "--patience", 2)
    run("--resume", folder, *STILL)
    assert differences(folder, truth) == []
    capsys.readouterr()
    run("--resume", folder, *STILL)
    out = capsys.readouterr().out
    assert f"nothing left to do: {ENDS_AT} of {ENDS_AT} updates" in out
    assert "a larger --patience goes on" in out


def test_with_more_patience_it_goes_on_as_if_it_had_never_ended():
    truth = run(*STILL, output="whole")
    folder = run(*STILL, "--patience", 2)
    assert summary_of(folder)["num_updates"] == ENDS_AT
    run("--resume", folder, *STILL, "--patience", 20)
    assert differences(folder, truth) == []


def test_patience_at_the_last_update_is_no_early_end():
    summary = summary_of(run(*STILL, "--patience", 3))
    assert (summary["num_updates"], summary["exit_reason"]) == (12, "")


def test_the_average_can_be_monitored_where_there_is_one(capsys):
    flags = (*STILL, "--patience", 2, "--monitor", "val/loss_ema")
    run(*flags, code=2)
    assert "--monitor val/loss_ema is of the average of the weights, and there is none" in (
        capsys.readouterr().err
    )
    folder = run(*flags, "--ema-decay", 0.5)
    assert summary_of(folder)["status"] == "done"


def on_ranks(rank, flags, stop):
    import tiny  # noqa: F401

    if stop and rank == int(os.environ["WORLD_SIZE"]) - 1:
        at_update(stop, interrupt)
    return train.main([*BASE, *map(str, flags)])


def test_ranks_end_together_and_after_a_resume():
    flags = ["--output", "runs", *STILL, "--patience", 2]
    outcomes = run_forked(on_ranks, flags, 4, world_size=2, timeout=120)
    assert values(outcomes) == [130, 130]
    outcomes = run_forked(on_ranks, [*flags, "--resume", "auto"], 0, world_size=2, timeout=120)
    assert values(outcomes) == [0, 0]
    (folder,) = Path("runs").iterdir()
    assert summary_of(folder)["num_updates"] == ENDS_AT
