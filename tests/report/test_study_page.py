"""The page of a study, out of a result that is made by hand: figures, tables, faults."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_studies import add_run, fill, make_study
from PIL import Image
from report_runs import Page
from study_results import ARMS, BATCHES, a_study_result

from lbaccel.report.of_study import of_study
from lbaccel.report.page import MOST_BYTES, page
from lbaccel.report.parts import report
from lbaccel.report.study_charts import value_by_batch
from lbaccel.report.target_chart import updates_to_target
from lbaccel.studies.folder import choose, share
from lbaccel.studies.results import study_result
from lbaccel.studies.rules import study_rule
from lbaccel.studies.to_target import Attempt, points_of


@pytest.fixture(scope="module")
def result():
    return a_study_result()


@pytest.fixture(scope="module")
def found(result, tmp_path_factory):
    return Page(page([of_study(result, tmp_path_factory.mktemp("study"))]))


@pytest.fixture(scope="module")
def charts(found):
    return found.charts()


def lines_of(chart, **values):
    return [line for line in chart["lines"] if all(line[k] == v for k, v in values.items())]


def test_it_parses_and_begins_with_the_verdict_and_updates_to_target(found, result):
    assert found.unclosed == [] and len(found.ids()) == len(set(found.ids()))
    order = [found.text.index(text) for text in (
        result["title"], result["verdict"][0], "Updates to target", "Results", "Scaling limits",
        "Comparisons", "Training beside validation", "Curves", "Tuning", "Runs",
        "Where the numbers come from",
    )]  # fmt: skip
    assert order == sorted(order)


def test_updates_to_target_is_log_log_with_perfect_scaling_and_the_bend(charts, result):
    chart = charts["study-1-updates"]
    assert chart["x"]["kind"] == "log2" and chart["y"]["kind"] == "log"
    (arm,) = (one for one in result["to_target"] if one["arm"] == "gradual")
    color = list(ARMS).index("gradual")
    (perfect,) = lines_of(chart, style="reference", c=color)
    first = arm["points"][0]["mean"]
    assert perfect["y"] == pytest.approx([first * 128 / b for b in BATCHES], rel=1e-4)
    (bend,) = lines_of(chart, style="dash", c=color)
    expected = [18.0 * (1 + 700.0 / b) for b in bend["x"]["batch"]]
    assert bend["y"] == pytest.approx(expected, rel=1e-3)
    (means,) = lines_of(chart, style="points", c=color)
    assert means["y"] == pytest.approx([p["mean"] for p in arm["points"]], rel=1e-4)
    marks = [(mark["n"], mark["x"]["batch"]) for mark in chart["marks"]]
    assert marks == [("gradual: 700", 700.0), ("ghost: 700", 700.0)]


def test_a_batch_size_of_which_a_seed_is_censored_is_a_hollow_mark(charts, result):
    (hollow,) = lines_of(charts["study-1-updates"], style="hollow")
    assert hollow["x"]["batch"] == [2048] and hollow["c"] == 0
    (point,) = [p for p in result["to_target"][0]["points"] if p["censored"]]
    met = [u for u in point["updates"] if u is not None]
    assert point["mean"] is None and len(met) == 2
    assert hollow["y"] == pytest.approx([sum(met) / 2], rel=1e-4)  # a lower bound
    (seeds,) = lines_of(charts["study-1-updates"], style="seeds", c=0)
    drawn = zip(seeds["x"]["batch"], seeds["y"], strict=True)
    assert [y for b, y in drawn if b == 2048] == met
    (means,) = lines_of(charts["study-1-updates"], style="points", c=0)
    assert 2048 not in means["x"]["batch"]


def test_a_single_arm_shows_its_interval_and_the_noise_scale(result):
    one = {**result, "to_target": result["to_target"][1:2]}
    chart = updates_to_target(one, "k")
    assert chart is not None
    critical, noise = chart.marks
    assert (critical.low, critical.high) == (520.0, 960.0)
    assert noise.text == "by the noise scale 610" and noise.x == {"batch": 610.0}


def test_a_study_without_a_target_has_no_such_figure(result):
    assert updates_to_target({**result, "target": None}, "k") is None
    never = points_of({b: {0: Attempt(b, None, until=9)} for b in BATCHES})
    nothing = [{**arm, "points": never, "fit": None} for arm in result["to_target"]]
    assert updates_to_target({**result, "to_target": nothing}, "k") is None


def test_error_has_a_line_an_arm_with_intervals_and_the_source_hollow(charts, result):
    chart = charts["study-1-value"]
    rows = [row for row in result["table"] if row["arm"] == "gradual"]
    (line,) = lines_of(chart, style="line-points", c=1)
    assert line["y"] == pytest.approx([100 - row["mean"] for row in rows], rel=1e-4)
    assert line["lo"] == pytest.approx([100 - row["high"] for row in rows], rel=1e-4)
    assert line["hi"] == pytest.approx([100 - row["low"] for row in rows], rel=1e-4)
    (source,) = lines_of(chart, style="hollow")
    assert source["x"]["batch"] == [128, 512, 2048] and source["y"] == [8.8, 9.1, 10.4]
    assert len(lines_of(chart, style="line-points")) == len(ARMS), "all arms are in one panel"


def test_a_loss_is_not_turned_into_an_error(result):
    chart = value_by_batch({**result, "metric": "val/loss"}, "k")
    assert chart is not None and chart.title == "val/loss against batch size"
    assert chart.lines[0].y[0] == pytest.approx(result["table"][0]["mean"], rel=1e-4)


def test_the_gap_has_its_sign(found):
    assert "Training less validation: +0.90 at 128" in found.text
    assert "-0.70 at 2,048" in found.text


def test_curves_have_a_colour_a_batch_size_and_a_diverged_run_is_named(charts):
    chart = charts["study-1-curves-0-3"]
    assert {line["c"] for line in chart["lines"]} == set(range(len(BATCHES)))
    names = [line["n"] for line in chart["lines"]]
    assert "batch 2,048, seed 1 (diverged)" in names
    assert "batch 2,048, mean of 2 seeds" in names and "batch 128, mean of 3 seeds" in names
    (diverged,) = (line for line in chart["lines"] if "diverged" in line["n"])
    assert diverged["y"][-1] is None


def test_what_went_wrong_is_said_before_the_figures(found):
    note = found.text.index("1 of 45 runs diverged and count as such: none-gbs2048-seed1.")
    assert note < found.text.index("Updates to target")
    assert "1 of 45 runs ended without reaching the target (censored)" in found.text
    assert found.text.count("at the edge of its grid") == 1  # in its row of the table
    assert "not reached" in found.text


def test_a_best_value_at_the_edge_of_its_grid_is_one_warning(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder)
    fill(folder, study, lambda cell: 90 + cell.seed / 10)
    entry = {"arm": "plain", "batch": 32, "setting": "base_lr", "values": [0.05, 0.1]}
    choose(folder, [{**entry, "results": [70.0, 71.0], "best": 0.1, "at_edge": True}])
    text = Page(report([folder])[0]).text
    assert text.count("so a better one may lie beyond it") == 1
    assert text.count("at the edge of its grid") == 2  # and in its row of the table


def test_the_noise_scale_of_each_place_is_a_row(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder, batches=[32], pairs=[], arms={"plain": {}})
    for cell in study.cells():
        noise = {"noise/critical_batch_size": 4000.0 + cell.seed, "noise/low": 900.0}
        line = {"update": 500, "samples_seen": 16_000, **noise, "noise/high": None}
        add_run(folder, cell, [80.0] * 6, more=[line])
    text = " ".join(Page(report([folder])[0]).text.split())
    assert "criticalbatchS/|G|²lowhigh" in text.replace(" ", "")
    assert "plain3234,001900unbounded" in text


def test_the_source_s_numbers_stand_beside_ours(found, result):
    (row,) = (r for r in result["table"] if (r["arm"], r["batch"]) == ("gradual", 128))
    assert f"{row['mean'] - 91.2:+.2f}" in found.text
    assert "After Goyal et al. (2017): Accurate, Large Minibatch SGD, table 1." in found.text


def test_a_study_of_which_nothing_has_ended_is_a_page_too(result, tmp_path):
    bare = {
        "value": None, "train_value": None, "status": "missing", "name": None, "folder": None,
        "reached": None, "censored": False, "history": {}, "provenance": None, "num_updates": None,
        "samples": None, "seconds": None, "peak_gib": None, "predicted_gib": None,
    }  # fmt: skip
    rows = [
        {**row, "n": 0, "mean": None, "low": None, "high": None, "train_mean": None, "wilson": None}
        for row in result["table"]
    ]
    empty = {
        **result, "runs": [{**run, **bare} for run in result["runs"]], "table": rows,
        "comparisons": [], "scaling_limits": [], "to_target": [], "tuning": [], "verdict": [],
        "warnings": [], "source": None, "target": None, "baseline": None,
    }  # fmt: skip
    found = Page(page([of_study(empty, tmp_path)]))
    assert found.unclosed == []
    assert "No run of this study has come to its end." in found.text
    assert "45 of 45 runs are missing" in found.text


def test_where_no_run_met_the_target_the_page_says_so(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder, target=99.0)
    fill(folder, study, lambda cell: 90 + cell.seed / 10)
    found = Page(report([folder])[0])
    for title in ("batch alone", "linear rule"):
        assert f"{title}: no critical batch, since no run reached the target." in found.text
    assert "study-1-updates" not in found.charts()


def test_an_event_is_no_reason_of_the_end(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder, batches=[32], seeds=2, pairs=[], arms={"plain": {}})
    first, second = study.cells()
    run = add_run(folder, first, [50.0] * 6)
    (run / "resumes.jsonl").write_text(json.dumps({"update": 40}) + "\n")
    add_run(folder, second, [50.0], status="failed", exit_reason="the disk is full")
    text = Page(report([folder])[0]).text
    assert "eventsresumed after update 40" in text
    assert text.count("reason of the end") == 1 and "reason of the endthe disk is full" in text


def test_a_run_that_stopped_is_in_a_line_and_a_shared_one_counts_once(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder, batches=[32, 128], seeds=1, pairs=[])
    cells = study.cells()
    share(folder, {cells[2].name: cells[0].name})
    add_run(folder, cells[0], [50.0] * 6, status="running")  # of which no process is left
    add_run(folder, cells[1], [50.0] * 6)
    text = Page(report([folder])[0]).text
    assert f"1 of 3 runs stopped and can go on: {cells[0].name}." in text
    assert f"1 of 3 runs are missing: {cells[3].name}." in text
    assert "2 of 3 runs have no result yet." in text
    assert "1 seed, 3 runs." in text


def test_thinned_curves_of_a_study_are_said_to_be_and_their_mean_is_whole(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder, batches=[32], pairs=[], arms={"plain": {}})
    for cell in study.cells():
        rng = np.random.default_rng(cell.seed)
        many = [
            {"update": 640 + i, "samples_seen": 20480 + 32 * i, "train/loss": float(value)}
            for i, value in enumerate(rng.normal(size=3000))
        ]
        add_run(folder, cell, [80.0] * 6, more=many)
    found = Page(report([folder])[0])
    chart = found.charts()["study-1-curves-0-0"]
    counts = {len(line["y"]) for line in chart["lines"]}
    assert f"Thinned to at most {max(counts)} points a curve; the lowest" in found.text
    assert found.text.count("Thinned to at most") == 1, "evaluations are whole"
    (mean,) = lines_of(chart, style="thick")
    assert 100 < len(mean["y"]) <= 200


def test_figures_are_embedded_from_inside_the_study_alone(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    for where in (folder, tmp_path):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(where / "l.png")
    figures = [
        {"name": "landscape", "file": "l.png", "alt": "a valley"},
        {"name": "outside", "file": "../l.png", "alt": "none"},
        {"name": "absent", "file": "m.png", "alt": "none"},
    ]
    found = Page(page([of_study(a_study_result(figures=figures), folder)]))
    (image,) = [attrs for tag, attrs in found.elements if tag == "img"]
    assert image["alt"] == "a valley" and image["src"].startswith("data:image/png;base64,")
    assert "lies outside the study's folder" in found.text and "m.png can't be read" in found.text


def test_the_json_inside_is_the_result_without_its_curves(found, result):
    inside = json.loads(found.scripts["study"])
    assert inside["table"] == json.loads(json.dumps(result["table"]))
    assert "history" not in inside["runs"][0] and inside["runs"][0]["provenance"]


def test_a_large_study_stays_below_2_mb(tmp_path, monkeypatch):
    long = a_study_result()
    for run in long["runs"]:
        points = [[u, 128 * u, u / 9e3, 50 + u % 7] for u in range(1, 2001)]
        run["history"] = {"train/loss": points, "train/top1": points, "val/top1": points[::20]}
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.yaml").write_text("name: x\n")
    monkeypatch.setattr("lbaccel.report.parts.study_result", lambda _: long)
    text, _ = report([folder, folder, folder])
    assert len(text.encode()) < MOST_BYTES


def test_a_study_on_disk_is_a_page_with_the_numbers_of_its_report(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder)
    fill(folder, study, lambda cell: 90 - (cell.batch == 512) * 3 + cell.seed / 10)
    text, (part,) = report([folder])
    found = Page(text)
    result = study_result(folder)
    below = {study_rule(result), *(arm["sentence"] for arm in result["to_target"])}
    assert part.content["verdict"] == [line for line in result["verdict"] if line not in below]
    for line in [*result["verdict"], *below, "Interquartile means"]:
        assert found.text.count(line) >= 1
    assert found.text.count(study_rule(result)) == 1
    inside = json.loads(found.scripts["study"])
    for run in result["runs"]:
        del run["history"], run["noise"]
    assert inside == result
    chart = found.charts()["study-1-updates"]
    means = lines_of(chart, style="points")
    assert len(means) == len(study.arms) and all(line["y"] for line in means)
    assert found.unclosed == [] and len(found.ids()) == len(set(found.ids()))


def test_a_study_with_a_damaged_and_a_diverged_run_is_a_page(tmp_path):
    folder = tmp_path / "study"
    study = make_study(folder)
    cells = study.cells()
    damaged = add_run(folder, cells[0], [50.0] * 6)
    (damaged / "metrics.jsonl").write_text("{nonsense\nmore\n")
    add_run(folder, cells[1], [50.0, 40.0], status="failed", diverged=True)
    add_run(folder, cells[2], [50.0] * 6)
    text, _ = report([folder])
    found = Page(text)
    assert "can't be read, and is left out" in found.text
    assert "1 of 18 runs diverged and count as such" in found.text


def test_a_study_that_has_not_begun_is_a_page(tmp_path):
    make_study(tmp_path / "study")
    text, _ = report([tmp_path / "study"])
    assert "18 of 18 runs are missing" in Page(text).text


def test_mcnemar_stands_beside_the_interval_over_seeds_and_not_in_it(result, tmp_path):
    test = {"seed": 0, "num_images": 2000, "only_one": 5, "only_other": 19, "p": 0.0066}
    compared = [{**result["comparisons"][0], "on_images": [test]}, *result["comparisons"][1:]]
    found = Page(page([of_study({**result, "comparisons": compared}, tmp_path)]))
    assert "on the same test images (McNemar)" in found.text
    assert "seed 0: right alone on 5 and 19 of 2,000, p = 0.0066" in found.text
