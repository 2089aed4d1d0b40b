"""A batch that follows the critical batch size, and AdaScale: each decision from its evidence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from runs_of_recipe import check_refused, differences, rows, run, whole
from test_growth import stopped_at

from lbaccel import BatchPlan, InputError, UpdateLoader, train
from lbaccel.noise.arithmetic import Interval
from lbaccel.noise.auto_batch import AutoBatch, Decision, next_size, read_decisions
from lbaccel.optim.adascale import adascale_gain
from lbaccel.runs.folder import DECISIONS

NUM_TRAIN = 1438
AUTO = "--global-batch-size auto --min-batch-size 64 --max-batch-size 512 --micro-batch-size 32"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Average:
    """What a run measured, as a test says it."""

    def __init__(self, low, high=math.inf, ratio=None):
        self.low, self.high = low, high
        self.ratio = 2 * low if ratio is None else ratio

    def interval(self):
        return Interval(self.low, self.high)


def loader_of(size=8, count=64, last="keep"):
    plan = BatchPlan(global_batch_size=size, micro_batch_size=4)
    return UpdateLoader(list(range(count)), plan, last_update=last)


def one_epoch(loader):
    return [update.num_samples for update in loader]


@pytest.mark.parametrize(
    ("low", "largest", "size"),
    [
        (15, 64, 8),
        (16, 64, 16),
        (40, 64, 32),
        (1e9, 64, 64),
        (1e9, 48, 32),
        (1, 64, 8),
        (None, 64, 8),
    ],
)
def test_the_size_doubles_up_to_the_low_end_of_the_interval_and_the_bound(low, largest, size):
    assert next_size(8, low=low, largest=largest) == size


def test_a_batch_grows_between_epochs_and_never_shrinks():
    loader, average = loader_of(), Average(20)
    auto = AutoBatch(loader, largest=32, average=average, replay=None)
    assert auto.before_epoch() is None  # nothing is known before the first epoch
    assert one_epoch(loader) == [8] * 8
    first = auto.before_epoch()
    assert (first.epoch, first.update, first.before, first.after) == (2, 8, 8, 16)
    assert (first.low, first.high, first.critical_batch_size) == (20, None, 40)
    assert auto.before_epoch() is None  # once an epoch
    assert one_epoch(loader) == [16] * 4
    average.low = 1000.0
    assert auto.before_epoch().after == 32  # the bound
    assert one_epoch(loader) == [32] * 2
    average.low = 3.0
    assert auto.before_epoch().after == 32
    assert one_epoch(loader) == [32] * 2


@pytest.mark.parametrize(
    "average",
    [Average(0.0, math.inf, ratio=5.0), Average(50, ratio=math.inf), Average(50, ratio=math.nan)],
)
def test_what_is_not_known_moves_nothing(average):
    loader = loader_of()
    auto = AutoBatch(loader, largest=32, average=average, replay=None)
    one_epoch(loader)
    decision = auto.before_epoch()
    assert decision.after == decision.before == 8 and decision.critical_batch_size is None
    assert "not known yet" in str(decision)


def test_in_the_middle_of_an_epoch_nothing_is_decided():
    loader = loader_of()
    auto = AutoBatch(loader, largest=32, average=Average(50), replay=None)
    one_epoch(loader)
    loader.next_update += 3  # as after a resume
    assert auto.before_epoch() is None


def test_an_update_over_the_end_of_an_epoch_keeps_its_size():
    loader = loader_of(size=12, count=64, last="wrap")
    auto = AutoBatch(loader, largest=48, average=Average(24), replay=None)
    assert one_epoch(loader) == [12] * 6  # 72 of 64
    auto.before_epoch()
    assert one_epoch(loader) == [24] * 3  # from 72 to 144 of 128
    assert [loader.stream.span(u)[0] for u in (5, 6, 7)] == [60, 72, 96]


def test_the_run_follows_its_own_measurements_and_its_rate_the_rule():
    folder = run(*AUTO.split(), "--epochs", 4, "--base-lr", 0.1, "--noise-scale", "plain")
    decisions = read_decisions(folder / DECISIONS, first=64)
    assert [d.epoch for d in decisions] == [2, 3, 4] and decisions[-1].after > 64
    lines = {line["update"]: line for line in rows(folder) if "noise/low" in line}
    for decision in decisions:  # the evidence is that of the update before
        line = lines[decision.update]
        low, high = line["noise/low"], line["noise/high"]
        if decision.critical_batch_size is not None:
            assert (
                decision.low == low
                and decision.critical_batch_size == line["noise/critical_batch_size"]
            )
            assert decision.high == high  # None: unbounded
        assert decision.after == next_size(decision.before, low=decision.low, largest=512)
    size = {1: 64, **{d.epoch: d.after for d in decisions}}
    start = 0
    for line in lines.values():
        epoch = start // NUM_TRAIN + 1
        assert line["batch/global"] == size[epoch]
        start += line["batch/global"]
    assert folder.name.endswith("-gbsauto")


@pytest.mark.parametrize("stop", [23, 25, 40])  # an epoch's last update, and others
def test_a_resumed_run_decides_alike_and_a_replay_needs_no_noise(stop):
    flags = [*AUTO.split(), "--epochs", "3", "--warmup", "none", "--lr-scaling", "sqrt"]
    truth = whole(*flags)
    assert {d.after for d in read_decisions(truth / DECISIONS, first=64)} - {64}  # it grows
    broken = stopped_at(stop, *flags)
    assert run("--resume", broken, *flags) == broken
    assert not differences(broken, truth)
    assert read_decisions(broken / DECISIONS, first=64) == read_decisions(
        truth / DECISIONS, first=64
    )
    if stop == 40:
        more = ["--noise-scale", "none", "--batch-decisions", truth]
        again = run(*flags, *more, output="again")
        plain = [
            [{k: v for k, v in line.items() if not k.startswith("noise/")} for line in rows(folder)]
            for folder in (again, truth)
        ]
        assert plain[0] == plain[1]


def test_a_dry_run_is_two_updates_whatever_is_decided(capsys):
    flags = "--global-batch-size auto --min-batch-size 1438 --max-batch-size 1438 --epochs 4"
    run("--dry-run", *flags.split(), "--micro-batch-size", 256)
    assert "dry run: 2 updates done" in capsys.readouterr().out


def test_a_replay_says_whose_evidence_it_follows(capsys):
    loader = loader_of()
    auto = AutoBatch(loader, largest=64, average=None, replay=[decision(update=8)])
    one_epoch(loader)
    first = auto.before_epoch()
    assert str(first).endswith(
        "8 -> 16, critical batch 40 (20 to unbounded), as in --batch-decisions"
    )
    assert (first.low, first.high, first.critical_batch_size) == (20.0, None, 40.0)
    one_epoch(loader)
    assert str(auto.before_epoch()).endswith("stays at 16, as in --batch-decisions")


def test_a_replay_keeps_to_the_largest_batch_and_knows_a_small_training_set(capsys):
    write(Path("d"), decision(update=23, before=64, after=1024))
    assert train.main([*AUTO.split(), "--batch-decisions", "d", "--model", "lbaccel_tiny"]) == 2
    assert "grow to 1024 samples, above --max-batch-size 512" in capsys.readouterr().err
    flags = "--global-batch-size auto --min-batch-size 5000 --max-batch-size 5000"
    write(Path("whole"), decision(update=1, before=1438, after=1438))
    run("--dry-run", *flags.split(), "--batch-decisions", "whole", "--micro-batch-size", 256)


def test_loss_dropout_knows_the_epochs_of_a_batch_that_grew():
    path = Path("decisions.jsonl")
    sizes = ((2, 23, 64, 256), (3, 29, 256, 256), (4, 35, 256, 512))
    write(path, *(decision(epoch=e, update=u, before=b, after=a) for e, u, b, a in sizes))
    flags = [*AUTO.split(), "--epochs", "4", "--last-update", "keep", "--batch-decisions", path]
    folder = run(*flags, "--loss-dropout", 3, 3)
    lines = [line for line in rows(folder) if "train/loss" in line]
    truth = 0
    for before, line in pairwise(lines):
        start = line["samples_seen"] - line["batch/global"]
        lower = line["train/loss"] < before["train/loss"]
        truth += lower and NUM_TRAIN * 2 < start < NUM_TRAIN * 3
    assert [line["batch/global"] for line in lines][22:25] == [30, 256, 256]
    assert lines[-1]["optim/num_dropped"] == truth > 0


def write(path, *decisions):
    path.write_text("".join(json.dumps(asdict(d)) + "\n" for d in decisions))
    return path


def decision(**changed):
    fields = {"epoch": 2, "update": 3, "before": 8, "after": 16}
    evidence = {"critical_batch_size": 40.0, "low": 20.0, "high": None}
    return Decision(**{**fields, **evidence, **changed})


def test_decisions_come_back_as_they_were_written(tmp_path):
    file = write(tmp_path / "batch_decisions.jsonl", decision(), decision(epoch=3, before=16))
    assert read_decisions(file, first=8) == [decision(), decision(epoch=3, before=16)]
    assert "global batch 8 -> 16, critical batch 40 (20 to unbounded)" in str(decision())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(asdict(decision(before=4))), "sizes must follow one another"),
        (json.dumps(asdict(decision(after=4))), "sizes must follow one another"),
        (json.dumps(asdict(decision(epoch=1))), "sizes must follow one another"),
        ("{}", "holds no decisions"),
        ("not json", "holds no decisions"),
    ],
)
def test_decisions_that_are_none_are_refused(text, says, tmp_path):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        read_decisions(tmp_path / "d.jsonl", first=8)


BAD = {
    "--global-batch-size auto": "so both are needed",
    "--global-batch-size auto --min-batch-size 64 --max-batch-size 32": "so both are needed",
    f"{AUTO} --batch-schedule bsi": "Leave one out",
    f"{AUTO} --noise-scale none": "Leave --noise-scale out",
    f"{AUTO} --last-update drop": "Use keep or wrap",
    f"{AUTO} --micro-batch-size 64": "Use --micro-batch-size <= 32",
    f"{AUTO} --batch-decisions nowhere": "can't be read",
    f"{AUTO} --lr-scaling adascale": "Leave one out",
    "--min-batch-size 64": "does not read --min-batch-size 64. Use --global-batch-size auto",
    "--lr-scaling adascale --base-batch-size 512": "must be smaller",
    "--lr-scaling adascale --noise-scale none": "the gain is measured",
    "--lr-scaling adascale --micro-batch-size 512": "Use --micro-batch-size <= 256",
    "--lr-scaling adascale --micro-batch-size 512 --noise-scale plain": "--micro-batch-size <= 256",
    f"{AUTO} --micro-batch-size 64 --noise-scale plain": "Use --micro-batch-size <= 32",
    "--lr-scaling adascale --base-batch-size 2000 --global-batch-size 4000": "must be smaller",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_with_2_and_leaves_nothing(flags, capsys, tmp_path):
    check_refused(flags, BAD[flags], capsys, tmp_path)


# -- AdaScale -----------------------------------------------------------------------------------

ADASCALE = ["--lr-scaling", "adascale", "--base-batch-size", 64]
ADASCALE += ["--micro-batch-size", 32, "--warmup", "none"]


def test_adascale_is_its_algorithm_update_by_update():
    folder = run(*ADASCALE, "--epochs", 3, "--base-lr", 0.1)  # 256 samples an update
    total = math.ceil(3 * NUM_TRAIN / 256) * 256
    progress, gain = 0.0, 1.0
    lines = [line for line in rows(folder) if "optim/lr" in line]
    for line in lines:
        shape = (1 + math.cos(math.pi * min(1, 64 * progress / total))) / 2
        assert line["optim/lr"] == pytest.approx(0.1 * gain * shape, rel=1e-9)
        progress += gain
        assert line["adascale/base_updates"] == pytest.approx(progress, rel=1e-12)
        sigma2, mu2 = line["noise/scale_s"] / 64, line["noise/grad_norm_sq"]
        gain = adascale_gain(sigma2, mu2, 256 / 64)
        assert line["adascale/gain"] == pytest.approx(gain, rel=1e-12)
        assert 1 <= gain <= 4
    assert 64 * progress >= total > 64 * (progress - lines[-2]["adascale/gain"])
    assert 17 < len(lines) <= total // 64  # between the updates of 256 and those of 64
    assert "val/top1" in rows(folder)[-1]  # the end was seen, and evaluated


def test_an_interrupted_adascale_run_goes_on_to_the_bit():
    flags = [*ADASCALE, "--epochs", "2"]
    truth = run(*flags, output="whole")
    broken = stopped_at(9, *flags)
    assert run("--resume", broken, *flags) == broken
    assert not differences(broken, truth)


@pytest.mark.parametrize("flags", [ADASCALE, AUTO.split()])
def test_another_micro_batch_is_refused_by_a_resume_where_the_run_follows_its_units(flags, capsys):
    broken = stopped_at(3, *flags)
    assert "another micro-batch or number of ranks gives another run" in capsys.readouterr().out
    assert train.main(["--resume", str(broken), "--micro-batch-size", "16"]) == 2
    assert "the units that the noise is measured by" in capsys.readouterr().err
    assert train.main(["--resume", str(broken), "--max-updates", "4"]) == 0
