"""The page as a file: it parses, needs no network, escapes what is hostile, is below 2 MB."""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise

import pytest
import yaml
from report_runs import Page, a_run_folder
from study_results import a_study_result

from lbaccel import cli
from lbaccel.commands import compare as compare_command
from lbaccel.errors import InputError
from lbaccel.report.chart import Chart, Landmark, Stroke
from lbaccel.report.drawing import view
from lbaccel.report.of_study import of_study
from lbaccel.report.page import CURVES, MOST_BYTES, json_block, page
from lbaccel.report.parts import report

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&` \u202egnp.exe \x1b[2J"
)
SHOWN_HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&` \\u202egnp.exe \\x1b[2J"
)


@pytest.fixture
def six(tmp_path):
    return [
        a_run_folder(
            tmp_path / f"lr{lr}-{seed}", updates=200, top=top + seed / 7, base_lr=lr, seed=seed
        )
        for lr, top in [(0.1, 90.0), (0.4, 91.0)]
        for seed in range(3)
    ]


def text_of(*paths, **options):
    return report(paths, **options)[0]


def compared(capsys, *arguments):
    parser = argparse.ArgumentParser()
    compare_command.add_arguments(parser)
    compare_command.run(parser.parse_args([*map(str, arguments), "--json"]))
    return json.loads(capsys.readouterr().out)


def test_every_element_is_closed_and_every_name_stands_once(six):
    for found in (Page(text_of(*six)), Page(text_of(six[0]))):
        assert found.unclosed == [] and found.open == []
        assert len(found.ids()) == len(set(found.ids()))


def test_the_page_asks_no_network(six):
    text = text_of(*six)
    for tag, attrs in Page(text).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            assert attrs.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", text)
    (policy,) = [a["content"] for t, a in Page(text).elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("options", [{}, {"metric": "val/loss"}, {"target": 80.0}])
def test_the_json_inside_is_what_compare_prints(six, options, capsys):
    flags = [word for k, v in options.items() for word in (f"--{k}", str(v))]
    inside = json.loads(Page(text_of(*six, **options)).scripts["comparison"])
    assert inside == compared(capsys, *six, *flags)
    assert len(inside["runs"]) == 6 and len(inside["groups"]) == 2


def test_the_json_of_one_run_is_that_too(six, capsys):
    assert json.loads(Page(text_of(six[0])).scripts["comparison"]) == compared(capsys, six[0])


def test_a_hostile_setting_is_text_and_nothing_else(six, capsys):
    config = yaml.safe_load((six[0] / "config.yaml").read_text())
    config |= {"model": HOSTILE, "mine": HOSTILE, HOSTILE: 1}
    (six[0] / "config.yaml").write_text(yaml.safe_dump(config))
    (six[0] / "env.json").write_text(json.dumps({"command": HOSTILE, "git_commit": HOSTILE}))
    found = Page(text_of(*six[:2]))
    assert sorted(found.scripts) == ["", "comparison", CURVES]
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert not [attrs for tag, attrs in found.elements if "onerror" in attrs]
    assert SHOWN_HOSTILE in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", found.text)
    assert json.loads(found.scripts["comparison"]) == compared(capsys, *six[:2])


def test_a_hostile_name_of_a_run_is_text(tmp_path):
    name = "<script>alert(1)<'\" onload=x & \u202e"
    found = Page(text_of(a_run_folder(tmp_path / name)))
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert "<script>alert(1)<'\" onload=x & \\u202e" in found.text


def test_a_hostile_study_is_text(tmp_path):
    names = ("title", "question", "note", "name", "scale")
    result = a_study_result(**dict.fromkeys(names, HOSTILE), verdict=[HOSTILE], warnings=[HOSTILE])
    result["arms"][0] |= {"title": HOSTILE}
    result["runs"][0] |= {"cell": HOSTILE}
    result["figures"] = [{"name": HOSTILE, "file": "../../etc/passwd", "alt": HOSTILE}]
    found = Page(page([of_study(result, tmp_path)]))
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert found.unclosed == [] and SHOWN_HOSTILE in found.text
    assert json.loads(found.scripts["study"])["title"] == HOSTILE


@pytest.mark.parametrize("value", [HOSTILE, "é \U0001f600 \ud800 \u2028", "<!--<script>"])
def test_json_in_the_page_reads_back_and_has_no_sign_of_html(value):
    text = str(json_block({"a": value}))
    assert json.loads(text) == {"a": value}
    assert not set("<>&") & set(text) and text.isascii()


@pytest.mark.slow
def test_63_runs_of_5000_updates_stay_below_2_mb(tmp_path):
    runs = [
        a_run_folder(tmp_path / f"{arm}-{seed}", updates=5000, evals=100, arm=arm, seed=seed)
        for arm in range(21)
        for seed in range(3)
    ]
    text = text_of(*runs)
    assert len(text.encode()) < MOST_BYTES
    found = Page(text)
    val = found.charts()["runs-3"]
    assert {len(line["y"]) for line in val["lines"]} == {100}, "evaluations are not thinned"
    assert "Thinned to at most" in found.text


def test_a_page_that_would_be_too_large_has_fewer_points(six, monkeypatch):
    monkeypatch.setattr("lbaccel.report.parts.POINTS", 4000)
    whole = text_of(*six)
    assert "Thinned to at most" not in whole
    monkeypatch.setattr("lbaccel.report.parts.MOST_BYTES", len(whole) - 1)
    text = text_of(*six)
    assert len(text) < len(whole) - 1 and "Thinned to at most" in text


def test_what_fits_in_no_page_is_refused_with_the_numbers(six, monkeypatch):
    monkeypatch.setattr("lbaccel.report.parts.MOST_BYTES", 10_000)
    with pytest.raises(InputError, match=r"these 6 runs and 0 studies make a page of 0\.\d MB"):
        text_of(*six)


def test_a_thinned_curve_has_its_extremes(tmp_path, monkeypatch):
    monkeypatch.setattr("lbaccel.report.parts.POINTS", 300)
    run = a_run_folder(tmp_path / "run", updates=900)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    found = Page(text_of(run))
    charts = json.loads(found.scripts[CURVES])
    (line,) = charts["runs-0"]["lines"]
    assert len(line["y"]) < 300
    assert min(line["y"]) == pytest.approx(min(losses), abs=1e-4)
    assert max(line["y"]) == pytest.approx(max(losses), abs=1e-4)
    assert "Thinned to at most" in found.text


def test_each_seed_is_thin_and_the_mean_is_thick(six):
    lines = Page(text_of(*six)).charts()["runs-3"]["lines"]
    assert [line["style"] for line in lines] == ["thin"] * 6 + ["thick"] * 2
    means = [line for line in lines if line["style"] == "thick"]
    each = [line["y"] for line in lines[:3]]
    expected = [sum(values) / 3 for values in zip(*each, strict=True)]
    assert means[0]["y"] == pytest.approx(expected, rel=1e-4)


def test_a_run_that_did_not_end_is_drawn_and_in_no_mean(six):
    summary = json.loads((six[0] / "summary.json").read_text())
    reason = "the loss of update 9 is not finite"
    (six[0] / "summary.json").write_text(
        json.dumps({**summary, "status": "failed", "exit_reason": reason})
    )
    found = Page(text_of(*six))
    names = [line["n"] for line in json.loads(found.scripts[CURVES])["runs-3"]["lines"]]
    assert "lr0.1-0" in names and any("mean of 2 seeds" in name for name in names)
    assert f"lr0.1-0 is failed: {reason}" in found.text


def test_every_chart_has_words_and_numbers_behind_it(six):
    found = Page(text_of(six[0]))
    charts = [attrs["id"] for tag, attrs in found.elements if attrs.get("class") == "chart"]
    assert len(charts) >= 5
    images = [attrs for tag, attrs in found.elements if attrs.get("role") == "img"]
    assert len(images) == len(charts)
    for attrs in images:
        for name in attrs["aria-labelledby"].split():
            assert name in found.ids()
    assert found.text.count("Numbers behind this chart") == len(charts)


def test_the_values_of_a_gap_are_no_line():
    line = Stroke("a", {"updates": [1, 2, 3, 4]}, [1.0, None, 2.0, 3.0])
    chart = Chart("k", "t", "alt", {"updates": "updates"}, "y", [line])
    (drawn,) = view(chart)["lines"]
    assert drawn["d"].count("M") == 2 and drawn["d"].count("L") == 1


def test_labels_at_the_ends_of_lines_do_not_overlap():
    lines = [Stroke(f"{i}", {"u": [1, 2]}, [0.0, 1.0 + i / 100], label=f"{i}") for i in range(8)]
    labels = view(Chart("k", "t", "alt", {"u": "u"}, "y", lines))["labels"]
    tops = sorted(label["at"] for label in labels)
    assert len(tops) == 8 and tops[-1] <= 100
    assert min(b - a for a, b in pairwise(tops)) > 5  # per cent of 250 pixels


def test_a_mark_outside_of_an_axis_is_not_drawn():
    line = Stroke("a", {"u": [1, 2], "s": [10, 20]}, [1.0, 2.0])
    chart = Chart("k", "t", "alt", {"s": "s"}, "y", [line], marks=[Landmark("here", x={"u": 1})])
    (mark,) = view(chart)["marks"]
    assert mark["text"] == "" and mark["d"] == ""


def test_runs_and_a_study_stand_on_one_page(six, tmp_path, monkeypatch):
    monkeypatch.setattr("lbaccel.report.parts.study_result", lambda _: a_study_result())
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.yaml").write_text("name: x\n")
    found = Page(text_of(study, *six))
    assert sorted(found.scripts) == ["", "comparison", CURVES, "study"]
    assert len(found.ids()) == len(set(found.ids()))


def test_two_studies_have_blocks_of_their_own(tmp_path):
    parts = [of_study(a_study_result(), tmp_path, number=n) for n in (1, 2)]
    found = Page(page(parts))
    assert sorted(found.scripts) == ["", CURVES, "study-data-1", "study-data-2"]
    assert len(found.ids()) == len(set(found.ids()))


def test_the_command_writes_the_file_and_prints_the_verdict(six, tmp_path, capsys):
    file = tmp_path / "r.html"
    assert cli.main(["report", *map(str, six), "--output", str(file)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Group 2 (base_lr=0.4) reaches") and second.startswith(f"{file} (0.")
    assert Page(file.read_text()).unclosed == []
    assert cli.main(["report", str(six[0]), "--output", str(file)]) == 0  # its own file again


def test_the_script_reads_all_that_it_is_given(tmp_path):
    text = page([of_study(a_study_result(), tmp_path)])
    script = Page(text).scripts[""]
    names = set()
    for chart in json.loads(Page(text).scripts[CURVES]).values():
        for one in (chart, chart["x"], *chart["lines"], *chart["marks"]):
            names |= set(one)
    assert len(names) > 10 and not [name for name in names if f".{name}" not in script]
