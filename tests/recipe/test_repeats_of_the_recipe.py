"""`--aug-repeats` in a run: the samples of its updates, a resume, a batch schedule, refusals."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from recipes import settings_of
from runs_of_recipe import BASE, check_refused, differences, rows, run, stopped_at, whole

from lbaccel.recipe.task import build_task

REPEATED = ("--aug-repeats", 4)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_update_of_the_recipe_shows_each_image_as_often_as_asked():
    given = [*BASE, *REPEATED, "--micro-batch-size", "32"]
    task = build_task(settings_of(*given), Accelerator(cpu=True), "fp32", say=lambda _: None)
    assert task.loader.repeats == 4
    labels = torch.cat([labels for _, (_, labels) in task.loader.peek()])
    assert torch.equal(labels.view(4, 64)[0].expand(4, 64), labels.view(4, 64))


def test_a_run_with_copies_depends_on_no_plan_and_ends_the_same_after_a_break(capsys):
    truth = whole(*REPEATED)
    said = capsys.readouterr().out
    assert "noise scale: not measured, as copies of one image" in said
    assert "an update of 256 samples has 64 images, 4 times each" in said
    assert "an epoch shows 360 of 1438 images" in said
    assert [row["samples_seen"] for row in rows(truth) if "train/loss" in row][:2] == [256, 512]
    folder = stopped_at(5, *REPEATED)
    assert differences(run("--resume", folder, output=folder.parent), truth) == []
    other = rows(run("--max-updates", 1, *REPEATED, "--micro-batch-size", 16))
    assert other[0]["train/loss"] == pytest.approx(rows(truth)[0]["train/loss"], rel=1e-5)


def test_a_batch_schedule_goes_on_where_each_of_its_sizes_holds_whole_sets(capsys):
    flags = "--epochs 4 --max-updates 8 --batch-schedule listed --milestones 2 3"
    flags = [*flags.split(), "--batch-sizes", 256, 512, "--global-batch-size", 128]
    found = [row["batch/global"] for row in rows(run(*flags, *REPEATED)) if "train/loss" in row]
    assert found[:2] == [128, 128] and set(found) <= {128, 256, 512, 1438 % 128}
    capsys.readouterr()
    run(*flags, "--aug-repeats", 128, "--batch-sizes", 256, 320, code=2)
    assert "--aug-repeats 128 with an update of 320 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--aug-repeats 3", "--aug-repeats 3 with an update of 512 samples: an update holds each"),
        ("--aug-repeats 0", "--aug-repeats='0' is not a whole number from 1"),
        ("--aug-repeats 2 --lr-scaling adascale", "--aug-repeats 2 with --lr-scaling adascale"),
        ("--aug-repeats 2 --noise-scale plain", "--aug-repeats 2 with --noise-scale plain: the"),
        (
            "--aug-repeats 2 --global-batch-size auto --min-batch-size 64 --max-batch-size 256",
            "--aug-repeats 2 with --global-batch-size auto",
        ),
    ],
)
def test_it_is_refused_where_copies_would_be_cut_apart_or_taken_for_samples(
    flags, says, capsys, tmp_path
):
    check_refused(flags, says, capsys, tmp_path)
