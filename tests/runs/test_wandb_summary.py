"""wandb's summary says of a run what its summary.json says, however the run ends."""

from __future__ import annotations

import json

import pytest
from offline_wandb import WITH_WANDB, fix_tops, keep_to
from runs_of_recipe import at_update, run, stopped_at

from lbaccel.errors import RunFailed
from lbaccel.runs.read import _inspect, load_wandb_offline
from lbaccel.runs.wandb_tracker import WandB, metric_name


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    keep_to(tmp_path, monkeypatch)


@pytest.fixture
def tops(monkeypatch):
    return fix_tops(monkeypatch)


def both(folder):
    """summary.json under wandb's names, and wandb's summary with these entries alone."""
    content = json.loads((folder / "summary.json").read_text())
    ours = {metric_name(key): value for key, value in content.items()}
    theirs = load_wandb_offline(folder / "wandb").summary
    return ours, {key: theirs[key] for key in ours}


def parts(folder):
    """The records of each start of the run, in order."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [_inspect(file) for file in files]


def exit_code(records):
    (end,) = [record["exit"] for record in records if "exit" in record]
    return end.get("exit_code", 0)


def fail():
    raise RunFailed("the card fell out.")


def test_a_run_that_ends_well_has_its_best_and_its_last_values(tops):
    folder = run(*WITH_WANDB)
    ours, theirs = both(folder)
    assert theirs == ours
    assert (theirs["status"], theirs["exit_reason"], theirs["num_updates"]) == ("done", "", 12)
    # two epochs of 1438 samples at 256, evaluated each half epoch: at 3, 6, 9 and 12
    assert (theirs["best/val/top1"], theirs["best/update"]) == (80.0, 6)
    assert theirs["best/epoch"] == pytest.approx(6 * 256 / 1438)
    assert theirs["val/top1"] == 70.0, "a later line wrote over the best, or the best over a line"
    (records,) = parts(folder)
    assert exit_code(records) == 0


def test_a_run_that_fails_says_why_and_is_failed_in_wandb_too(tops):
    undo = at_update(8, fail)
    try:
        folder = run(*WITH_WANDB, code=1)
    finally:
        undo()
    ours, theirs = both(folder)
    assert theirs == ours
    assert (theirs["status"], theirs["exit_reason"]) == ("failed", "the card fell out.")
    assert (theirs["best/val/top1"], theirs["best/update"]) == (80.0, 6)
    (records,) = parts(folder)
    assert exit_code(records) == 1


def test_a_resume_keeps_the_best_of_before_the_interrupt_in_its_own_part(tops):
    folder = stopped_at(8, *WITH_WANDB)
    ours, theirs = both(folder)
    assert theirs == ours
    assert (theirs["status"], theirs["exit_reason"]) == ("interrupted", "interrupt after update 8")
    run(*WITH_WANDB, "--resume", folder)
    ours, theirs = both(folder)
    assert theirs == ours
    assert (theirs["status"], theirs["best/update"], theirs["num_updates"]) == ("done", 6, 12)
    first, second = parts(folder)
    assert (exit_code(first), exit_code(second)) == (255, 0)
    # the part that is uploaded last is what the server shows
    alone = {}
    for record in second:
        alone |= record.get("summary", {}).get("update", {})
    assert flat(alone)["best/val/top1"] == 80.0


def flat(summary):
    from lbaccel.runs.read import flatten

    return flatten(summary)


def test_before_its_end_a_run_is_running_and_has_the_best_so_far(tops, monkeypatch):
    told, plain = [], WandB.summarize

    def spy(self, values):
        told.append(dict(values))
        plain(self, values)

    monkeypatch.setattr(WandB, "summarize", spy)
    run(*WITH_WANDB)
    begun, *improved, _ = told
    assert (begun["status"], begun["best/val/top1"]) == ("running", None)
    assert [values["best/val/top1"] for values in improved] == [50.0, 80.0]


def test_a_wandb_that_can_not_be_told_costs_the_run_nothing(tops, monkeypatch, capsys):
    def gone(self, values):
        if values.get("status") == "done":
            raise ConnectionError("no route")

    monkeypatch.setattr(WandB, "summarize", gone)
    folder = run(*WITH_WANDB)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert "note: the summary of wandb was not written (ConnectionError: no route)" in (
        capsys.readouterr().out
    )
    assert (folder / "metrics.csv").exists()
