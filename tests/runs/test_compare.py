"""`lbaccel compare`: one row a run, missing is not zero, and nothing equal is said twice."""

import argparse
import csv
import json
import math

import pytest
import yaml

from lbaccel.commands import compare as compare_command
from lbaccel.errors import InputError
from lbaccel.runs import compare, compare_figure
from lbaccel.runs.read import Point, Run


def a_run(name, values, *, metric="val/top1", batch=64, config=None, summary=None, hours=True):
    points = tuple(
        Point(u, u * batch, u / 10 if hours else None, value) for u, value in enumerate(values, 1)
    )
    return Run(name, config or {}, summary or {}, {metric: points} if points else {}, "folder")


def write_run(path, *, batch, tops, **config):
    path.mkdir()
    settings = {"model": "vit", "global_batch_size": batch, **config}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [
        {"update": u, "samples_seen": u * batch, "perf/seconds": 3.6 * u, "val/top1": top}
        for u, top in enumerate(tops, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"status": "done", "num_updates": len(tops), "peak_gib": batch / 100}
    (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


def command(*arguments):
    parser = argparse.ArgumentParser()
    compare_command.add_arguments(parser)
    return compare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_equal_settings_once_and_differing_ones_as_columns(tmp_path, capsys):
    a = write_run(tmp_path / "a", batch=64, tops=[0.2, 0.6, 0.5], seed=0, output="runs/a")
    b = write_run(tmp_path / "b", batch=512, tops=[0.1, 0.4], seed=0, output="runs/b")
    assert command(a, b, "--target", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "same in all 2 runs: model=vit; 1 setting at its default"
    header, first, second = (line.split() for line in lines[2:])
    assert " ".join(header) == (
        "name global_batch_size best val/top1 best_at_samples last val/top1 updates samples "
        "seconds peak_gib samples_to_target seconds_to_target delta"
    )
    assert first == ["a", "64", "0.6", "128", "0.5", "3", "192", "10.8", "0.64", "128", "7.2", "-"]
    assert second == [
        "b",
        "512",
        "0.4",
        "1,024",
        "0.4",
        "2",
        "1,024",
        "7.2",
        "5.12",
        "-",
        "-",
        "-0.2",
    ]
    assert len({len(line) for line in lines[2:]}) == 1, "the columns are not aligned"


def test_csv_holds_full_numbers_and_empty_cells(tmp_path):
    a = write_run(tmp_path / "a", batch=3, tops=[1 / 3])
    b = write_run(tmp_path / "b", batch=5, tops=[2 / 3])
    command(a, b, "--csv", tmp_path / "out.csv", "--target", "0.5")
    with (tmp_path / "out.csv").open() as file:
        first, second = csv.DictReader(file)
    assert float(first["best"]) == 1 / 3
    assert float(second["delta"]) == 2 / 3 - 1 / 3
    assert (first["samples_to_target"], first["delta"]) == ("", "")
    assert second["samples_to_target"] == "5"


def test_markdown_has_a_rule_and_as_many_cells_in_every_line():
    rows = compare.table([a_run("a|b", [0.5]), a_run("c", [0.25])], "val/top1")
    lines = compare.markdown(rows, "val/top1").splitlines()
    assert lines[1].startswith("| --- | ---:")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert len(lines) == 2 + 2


def test_of_a_loss_the_lowest_is_best_and_the_target_is_reached_from_above():
    one = a_run("a", [3.0, 1.0, 0.5, 0.75], metric="val/loss")
    (row,) = compare.table([one], "val/loss", target=1.0)
    assert (row["best"], row["last"]) == (0.5, 0.75)
    assert row["samples_to_target"] == 2 * 64
    assert row["seconds_to_target"] == pytest.approx(2 / 10 * 3600)


def test_of_an_accuracy_the_first_of_equal_bests_counts():
    best = compare.best_point(a_run("a", [0.1, 0.9, 0.9]).history["val/top1"], "val/top1")
    assert best is not None and best.update == 2


@pytest.mark.parametrize(("x", "at"), [("samples", 2 * 64), ("updates", 2), ("hours", 2 / 10)])
def test_the_place_of_the_best_is_on_the_axis_asked_for(x, at):
    (row,) = compare.table([a_run("a", [0.1, 0.9])], "val/top1", x=x)
    assert row[f"best_at_{x}"] == at


def test_what_is_missing_is_a_dash_and_never_zero():
    bare = Run("bare", {}, {}, {}, "folder")
    rows = compare.table([a_run("a", [0.5], config={"ema": 0}), bare], "val/top1", target=0.5)
    cells = compare.aligned(rows, "val/top1").splitlines()[2].split()
    assert cells == ["bare", *["-"] * (len(rows[0]) - 1)]
    assert rows[0]["ema"] == 0


def test_a_run_that_diverged_shows_nan_and_its_best_is_finite():
    (row,) = compare.table([a_run("a", [0.3, None])], "val/top1")
    assert row["best"] == 0.3
    assert isinstance(row["last"], float) and math.isnan(row["last"])
    assert compare.formatted("last", row["last"]) == "nan"


def test_a_crashed_run_is_measured_by_its_history_and_a_whole_one_by_its_summary():
    crashed = a_run("a", [0.1, 0.2])
    whole = a_run("b", [0.1], summary={"num_updates": 9, "samples_seen": 900, "seconds": 3.0})
    first, second = compare.table([crashed, whole], "val/top1")
    assert (first["updates"], first["samples"]) == (2, 2 * 64)
    assert first["seconds"] == pytest.approx(2 / 10 * 3600)
    assert (second["updates"], second["samples"], second["seconds"]) == (9, 900, 3.0)


def test_delta_is_the_difference_of_the_bests_to_the_first_run():
    rows = compare.table([a_run("a", [0.5]), a_run("b", [0.75]), a_run("c", [0.25])], "val/top1")
    assert [row["delta"] for row in rows] == [None, 0.75 - 0.5, 0.25 - 0.5]


def test_a_setting_named_like_a_result_does_not_hide_the_result():
    runs = [a_run(name, [0.5], config={"seconds": limit}) for name, limit in (("a", 1), ("b", 2))]
    rows = compare.table(runs, "val/top1")
    assert [row["config/seconds"] for row in rows] == [1, 2]
    assert all(row["seconds"] == pytest.approx(360) for row in rows)


def test_a_missing_setting_differs_from_one_that_is_none():
    assert compare.split_settings([{"a": None}, {}]) == ({}, ["a"])


def test_runs_of_one_name_can_be_told_apart():
    named = compare.distinct_names([a_run("a", []), a_run("b", []), a_run("a", [])])
    assert [one.name for one in named] == ["a", "b", "a (2)"]


def test_an_unknown_metric_names_those_that_there_are(tmp_path):
    a = write_run(tmp_path / "a", batch=3, tops=[1 / 3])
    with pytest.raises(InputError, match=r"--metric val/top5: .* Use one of: val/top1"):
        command(a, "--metric", "val/top5")


def test_an_absent_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        command(tmp_path / "absent")


def test_output_into_an_absent_folder_says_how_to_make_it(tmp_path):
    a = write_run(tmp_path / "a", batch=3, tops=[1 / 3])
    for option in ("--csv", "--plot"):
        with pytest.raises(InputError, match=r"mkdir -p .*/absent"):
            command(a, option, tmp_path / "absent" / "out.png")


@pytest.mark.parametrize("x", ["samples", "updates", "hours"])
def test_a_plot_is_drawn_on_every_axis(tmp_path, x):
    runs = [a_run("a", [0.1, 0.2, 0.4]), a_run("b", [0.1, None, 0.3], batch=512)]
    path = tmp_path / "plot.png"
    compare_figure.plot(runs, path, metric="val/top1", x=x, target=0.3)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_a_known_file_type_and_points_on_its_axis(tmp_path):
    timeless = a_run("a", [0.1], hours=False)
    with pytest.raises(InputError, match=r"cannot draw a '\.txt' file"):
        compare_figure.plot([timeless], tmp_path / "plot.txt", metric="val/top1")
    with pytest.raises(InputError, match=r"--x hours: no run .* Use --x updates"):
        compare_figure.plot([timeless], tmp_path / "plot.png", metric="val/top1", x="hours")
    assert list(tmp_path.iterdir()) == []
