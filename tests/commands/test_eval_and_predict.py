"""`lbaccel eval` and `lbaccel predict` as they are typed: text, exit codes, files."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest
from judging import photos_and_run

from lbaccel.cli import main
from lbaccel.product import files


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and test_files.py draws them."""
    monkeypatch.setattr(files, "draw_confusion", lambda result, path: None)
    monkeypatch.setattr(files, "draw_mistakes", lambda result, path: True)


def test_the_report_has_a_table_and_sentences(capsys, tmp_path):
    _, folder = photos_and_run()
    assert main(["eval", str(folder), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert f"top-1 is {found['top1_pct']:.2f} %: {found['num_right']} of 15 images" in out
    assert "class  n  recall  95 % interval" in " ".join(out.split("\n")).replace("   ", "  ")
    assert "Calibration error is" in out
    assert out.splitlines()[-1] == f"files: {tmp_path / 'out'}"


def test_json_stands_alone(capsys):
    data, folder = photos_and_run()
    assert main(["eval", str(folder), "--data", f"folder:{data}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 15


def test_a_share_below_what_was_asked_for_is_exit_code_1(capsys):
    _, folder = photos_and_run()
    assert main(["eval", str(folder), "--fail-below", "0"]) == 0
    assert main(["eval", str(folder), "--fail-below", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].endswith("is below --fail-below 1")
    assert main(["eval", str(folder), "--fail-below", "90"]) == 2
    assert (
        "--fail-below='90' is not a share from 0 to 1, such as 0.9 for 90 %."
        in capsys.readouterr().err
    )
    assert main(["eval", str(folder), "--tta", "crop"]) == 2
    assert "'flip'" in capsys.readouterr().err


def test_a_second_model_is_compared_in_words(capsys):
    _, folder = photos_and_run()
    assert main(["eval", str(folder), "--against", str(folder / "checkpoints/last")]) == 0
    out = capsys.readouterr().out
    assert "(McNemar's exact test)" in out
    assert f"B is {folder / 'checkpoints/last'}: top-1" in out


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_csv_with_a_row_for_each_file(capsys):
    data, folder = photos_and_run()
    assert main(["predict", str(folder), str(data / "val"), "--topk", "2"]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 15
    assert list(rows[0]) == [
        *("file", "class_1", "probability_1", "class_2", "probability_2", "error")
    ]
    assert 0.99 < float(rows[0]["probability_1"]) + float(rows[0]["probability_2"]) <= 1.000001 or (
        float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"])
    )


def test_an_unreadable_file_is_a_row_and_exit_code_1(capsys, tmp_path):
    data, folder = photos_and_run()
    bad = tmp_path / "a\nb\x1b[2J.png"
    bad.write_bytes(b"")
    given = [str(bad), str(data / "val"), str(tmp_path / "absent.png")]
    flags = ["--threshold", "0.9", "--sort-into", str(tmp_path / "sorted")]
    assert main(["predict", str(folder), *given, *flags]) == 1
    captured = capsys.readouterr()
    rows = table(captured.out)
    assert len(captured.out.splitlines()) == 1 + len(rows) == 18
    assert "\x1b" not in captured.out
    assert [bool(row["error"]) for row in rows] == [True, *[False] * 15, True]
    assert "2 of 17 files could not be read" in captured.err
    sorted_ = list((tmp_path / "sorted").rglob("*.png"))
    assert len(sorted_) == 15
    num_unsure = sum(row["unsure"] == "1" for row in rows)
    assert sum(path.parent.name == "unsure" for path in sorted_) == num_unsure > 0


def test_names_come_on_standard_input_and_rows_go_to_a_file(capsys, tmp_path, monkeypatch):
    data, folder = photos_and_run()
    names = "\n".join(str(path) for path in sorted((data / "val/cat").iterdir()))
    out = tmp_path / "p.csv"
    for _ in range(2):  # an earlier table is replaced
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names.encode())))
        assert main(["predict", str(folder), "-", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert len(table(out.read_text(encoding="utf-8"))) == 5
    out.write_text("mine")
    assert main(["predict", str(folder), str(data / "val"), "--out", str(out)]) == 2
    assert "is no table of lbaccel predict" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_numbers_of_no_use_are_refused(capsys):
    data, folder = photos_and_run()
    for flags, says in (
        (
            ["--threshold", "80"],
            "--threshold='80' is not a share from 0 to 1, such as 0.9 for 90 %.",
        ),
        (["--topk", "0"], "--topk='0' is not a whole number from 1 to 2^53"),
    ):
        assert main(["predict", str(folder), str(data / "val"), *flags]) == 2
        assert says in capsys.readouterr().err
    assert main(["predict", str(folder), str(data / "val"), "--topk", "9"]) == 0
    assert "the model has 3 classes" in capsys.readouterr().err
