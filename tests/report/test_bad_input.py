"""Paths and files that are of no use to a report: one sentence each, and nothing is replaced."""

from __future__ import annotations

import json

import pytest
from report_runs import Page, a_run_folder

from lbaccel import cli


def refused(capsys, *arguments, code=2):
    assert cli.main(["report", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return a_run_folder(tmp_path / "runs" / "a")


def test_a_folder_that_is_neither_run_nor_study(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, run, "empty")
    assert line.startswith("error: empty: no metrics.jsonl here")
    assert line.endswith("The results folder of a study holds study.yaml.")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_of_runs_says_how_to_name_them(run, capsys):
    assert "use runs/*" in refused(capsys, "runs")


def test_a_path_that_is_not_there(run, capsys):
    assert "There is no such folder" in refused(capsys, "absent")


def test_a_damaged_line_names_file_and_line(run, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{broken\n" + json.dumps({"update": 99}) + "\n")
    line = refused(capsys, a_run_folder(run.parent / "b"), run)
    assert line.startswith(f"error: {run}/metrics.jsonl:") and "Remove line" in line


def test_a_cut_last_line_is_a_warning_beside_the_page_and_on_it(run, capsys):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-20])
    assert cli.main(["report", str(run), "--output", "r.html"]) == 0
    assert "warning:" in capsys.readouterr().err
    page = Page((run.parent.parent / "r.html").read_text())
    assert "Please note" in page.text


def test_a_metric_that_no_run_has(run, capsys):
    line = refused(capsys, run, "--metric", "val/top7")
    assert "none of the 1 runs has logged it" in line and "val/top1" in line


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("runs", "it is a folder"),
        ("no/r.html", "there is no folder no"),
        ("notes.html", "it is there, and is no report of lbaccel"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    place, why, run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    monkeypatch.setattr("lbaccel.report.parts.report", lambda *_, **__: pytest.fail("work"))
    assert f"can't be written: {why}" in refused(capsys, run, "--output", place)
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"


def test_an_evaluation_that_was_edited_is_a_sentence_on_the_page(run, capsys):
    folder = run / "eval" / "update_000040-val"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text('{"made_by": "lbaccel eval", "confusion": "none"}')
    assert cli.main(["report", str(run), "--output", "r.html"]) == 0
    page = Page((run.parent.parent / "r.html").read_text())
    assert "eval/update_000040-val/eval.json can't be used" in page.text


def test_resumes_that_are_no_lines_of_json_name_the_file(run, capsys):
    (run / "resumes.jsonl").write_text("nonsense\nmore\n")
    assert f"{run}/resumes.jsonl:1" in refused(capsys, run)
