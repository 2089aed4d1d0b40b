"""Runs that differ only in their seed: one group, its mean, an interval, and each run's value."""

from __future__ import annotations

import argparse
import csv
import json
import math

import numpy as np
import pytest
import scipy.stats
import yaml

from lbaccel.commands import compare as compare_command
from lbaccel.runs import compare_figure
from lbaccel.runs.compare_figure import mean_curve
from lbaccel.runs.groups import Mean, group_rows, groups_of, left_out
from lbaccel.runs.read import Point, Run


def a_run(name, *values, status=None, **config):
    points = tuple(Point(u, 64 * u, u / 10, value) for u, value in enumerate(values, 1))
    summary = {} if status is None else {"status": status}
    return Run(name, config, summary, {"val/top1": points}, "folder")


def write(path, *tops, status="done", **config):
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"model": "vit", **config}))
    rows = [{"update": u, "samples_seen": 64 * u, "val/top1": t} for u, t in enumerate(tops, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps({"status": status}))
    return path


def command(*arguments):
    parser = argparse.ArgumentParser()
    compare_command.add_arguments(parser)
    return compare_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def five(tmp_path):
    """Two rates, three seeds and two."""
    return [
        write(tmp_path / f"lr{lr}-{seed}", top - 5, top, seed=seed, base_lr=lr)
        for lr, seed, top in [
            (0.1, 0, 90.0), (0.1, 1, 91.0), (0.1, 2, 95.0), (0.5, 0, 80.0), (0.5, 1, 82.0),
        ]
    ]  # fmt: skip


@pytest.mark.parametrize("values", [(1.0, 2.0), (90.0, 91.0, 95.0), tuple(np.arange(9.0) ** 2)])
def test_the_interval_is_students(values):
    found = Mean(values)
    expected = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    assert found.interval == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values))


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert (Mean((3.0,)).mean, Mean((3.0,)).interval) == (3.0, None)
    assert (Mean(()).mean, Mean(()).half_width) == (None, None)


def test_equal_values_have_an_interval_of_no_width():
    assert Mean((7.0, 7.0)).interval == (7.0, 7.0)


def test_runs_are_grouped_where_nothing_but_the_seed_differs():
    runs = [a_run("a", 1.0, seed=0, lr=0.1), a_run("b", 1.0, seed=0, lr=0.2)]
    runs += [a_run("c", 1.0, seed=1, lr=0.1), a_run("d", 1.0, seed=1, lr=0.1, ema=True)]
    grouped = [[one.name for one in group.runs] for group in groups_of(runs)]
    assert grouped == [["a", "c"], ["b"], ["d"]]


def test_runs_that_name_no_seed_are_not_grouped():
    assert len(groups_of([a_run("a", 1.0, lr=0.1), a_run("b", 2.0, lr=0.1), a_run("c", 2.0)])) == 3


def test_a_whole_number_read_from_json_is_the_same_setting():
    assert (
        len(groups_of([a_run("a", 1.0, seed=0, epochs=20), a_run("b", 1.0, seed=1, epochs=20.0)]))
        == 1
    )


def test_the_best_of_each_seed_counts_once():
    runs = [a_run("a", 4.0, 8.0, 6.0, seed=0), a_run("b", 10.0, seed=1), a_run("c", 12.0, seed=1)]
    (group,) = groups_of(runs)
    assert group.bests("val/top1") == {0: 8.0, 1: 11.0}
    assert group.mean("val/top1").n == 2
    (note,) = left_out([group], "val/top1")
    assert note.startswith("group 1 has seed 1 2 times: runs of one seed are no independent draws")


@pytest.mark.parametrize("status", ["failed", "interrupted", "stopped", "crashed", "unfinished"])
def test_a_run_that_did_not_end_is_in_no_mean_and_is_named(status):
    runs = [a_run("a", 8.0, seed=0, status="done"), a_run("b", 2.0, seed=1, status=status)]
    (group,) = groups_of(runs)
    assert group.bests("val/top1") == {0: 8.0}
    assert left_out([group], "val/top1") == [f"b is {status}: the mean of its group leaves it out"]


def test_a_run_without_the_metric_is_named():
    runs = [a_run("a", 8.0, seed=0), a_run("b", None, seed=1)]
    assert left_out(groups_of(runs), "val/top1") == [
        "b has no val/top1: the mean of its group leaves it out"
    ]


def test_delta_is_the_difference_of_the_means_to_the_first_group():
    runs = [
        a_run(f"{lr}{s}", v, seed=s, lr=lr) for lr, s, v in [(1, 0, 4.0), (1, 1, 6.0), (2, 0, 9.0)]
    ]
    first, second = group_rows(groups_of(runs), "val/top1")
    assert (first["mean"], first["delta"], first["seeds"]) == (5.0, None, 2)
    assert (second["mean"], second["delta"], second["half_width"]) == (9.0, 4.0, None)
    assert (first["lr"], first["each"]) == (1, "0: 4, 1: 6")


def test_the_command_prints_the_groups_and_then_the_runs(five, capsys):
    assert command(*five) == 0
    out = capsys.readouterr().out
    groups, runs = out.split("\n\n")[1], out.split("\n\n")[3]
    header, first, second = groups.splitlines()
    assert header.split("  ")[0] == "group" and "mean best val/top1" in header
    half = 4.30265 * math.sqrt(7) / math.sqrt(3)  # t of two degrees of freedom; variance 7
    assert first.split()[:5] == ["1", "0.1", "3", "92", f"{half:.3g}"]
    assert "0: 90, 1: 91, 2: 95" in first
    assert second.split()[:4] == ["2", "0.5", "2", "81"] and second.split()[-1] == "-11"
    assert [line.split()[0] for line in runs.splitlines()] == [
        "name",
        *(path.name for path in five),
    ]
    assert [line.split()[1] for line in runs.splitlines()] == ["group", "1", "1", "1", "2", "2"]
    assert "delta" in groups and "delta" not in runs


def test_without_a_group_nothing_is_said_of_groups(five, capsys):
    command(five[0], five[3])
    out = capsys.readouterr().out
    assert "group" not in out and "Student" not in out


def test_without_a_group_a_curve_is_named_with_the_settings_that_differ(
    five, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(compare_figure, "save", lambda figure, path: drawn.append(figure))
    command(five[0], five[3], "--plot", tmp_path / "out.png")
    legend = drawn[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == [
        "lr0.1-0 (base_lr=0.1)",
        "lr0.5-0 (base_lr=0.5)",
    ]


def test_csv_has_each_run_and_the_figures_of_its_group(five, tmp_path):
    command(*five, "--csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["1", "1", "1", "2", "2"]
    assert [float(row["best"]) for row in rows] == [90.0, 91.0, 95.0, 80.0, 82.0]
    assert {float(row["group_mean"]) for row in rows[:3]} == {92.0}
    low, high = Mean((80.0, 82.0)).interval
    assert (float(rows[4]["group_low"]), float(rows[4]["group_high"])) == (low, high)
    command(*five[:1], "--csv", tmp_path / "out.csv")  # its own table is replaced
    with (tmp_path / "out.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["group_seeds"], row["group_low"]) == ("1", "")


def test_json_is_alone_on_standard_output(five, capsys):
    command(*five, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "val/top1" and found["settings"] == {"model": "vit"}
    assert [row["best"] for row in found["runs"]] == [90.0, 91.0, 95.0, 80.0, 82.0]
    first, second = found["groups"]
    assert first["best_by_seed"] == {"0": 90.0, "1": 91.0, "2": 95.0}
    assert (first["mean"], first["level"], first["settings"]) == (92.0, 0.95, {"base_lr": 0.1})
    assert [first["low"], first["high"]] == pytest.approx(Mean((90.0, 91.0, 95.0)).interval)
    assert second["runs"] == ["lr0.5-0", "lr0.5-1"]


def test_a_mean_curve_stands_where_all_runs_have_a_value():
    found = mean_curve([[(1, 4.0), (2, 6.0), (3, 7.0)], [(1, 6.0), (3, 9.0)]])
    assert [(at, of.mean) for at, of in found] == [(1, 5.0), (3, 8.0)]
    assert mean_curve([]) == []


def test_the_figure_has_a_mean_a_band_and_a_thin_line_a_run(five, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare_figure, "save", lambda figure, path: drawn.append(figure))
    command(*five, "--plot", tmp_path / "out.png")
    (axes,) = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["base_lr=0.1: mean of 3 seeds", "base_lr=0.5: mean of 2 seeds"]
    assert len(axes.lines) == 3 + 1 + 2 + 1 and len(axes.collections) == 2
    assert len({line.get_color() for line in axes.lines}) == 2
    means = [line for line in axes.lines if line.get_linewidth() == 2]
    assert [list(line.get_ydata()) for line in means] == [[87.0, 92.0], [76.0, 81.0]]
    bottom, top = axes.get_ylim()
    assert bottom > 73 and top < 97, "the band widens the axis"
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx(
        (Mean((85.0, 86.0, 90.0)).interval[0], Mean((90.0, 91.0, 95.0)).interval[1])
    )


def test_a_diverged_run_leaves_a_gap_in_the_mean(five, tmp_path):
    diverged = write(tmp_path / "nan", 50.0, None, seed=3, base_lr=0.1)
    command(*five, diverged, "--plot", tmp_path / "out.svg")
    assert (tmp_path / "out.svg").read_bytes().startswith(b"<?xml")
