"""A study's tables: the source's layout, and every number of the result in them."""

from __future__ import annotations

import csv
import io
import re

import pytest
from made_studies import add_run, fill, make_study

from lbaccel.errors import InputError
from lbaccel.runs.outputs import writable
from lbaccel.studies.folder import choose
from lbaccel.studies.results import study_result
from lbaccel.studies.tables import TABLE_FILE, as_csv, as_markdown, as_text


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "study"
    study = make_study(folder, batches=[32, 128, 1024])
    for cell in study.cells():
        if (cell.arm, cell.batch, cell.seed) == ("linear", 1024, 2):
            add_run(folder, cell, [40.0], status="failed", diverged=True)
        elif (cell.arm, cell.batch, cell.seed) != ("linear", 128, 0):
            add_run(folder, cell, [75.0, *[89 + 0.1 * cell.seed - cell.batch / 1000] * 5])
    entry = {"arm": "plain", "batch": 32, "setting": "base_lr", "values": [0.05, 0.1]}
    choose(folder, [{**entry, "results": [70.0, None], "best": 0.05, "at_edge": True}])
    return study_result(folder)


def lines_of(text, begin):
    return [line for line in text.splitlines() if line.startswith(begin)]


def test_arms_are_rows_and_batch_sizes_columns_with_updates_beside_each_accuracy(result):
    text = as_text(result)
    heading = re.split(r" {2,}", lines_of(text, "batch  ")[0])
    assert heading == ["batch", "32", "128", "1,024"]
    plain, linear = lines_of(text, "batch alone  ")[0], lines_of(text, "linear rule  ")[0]
    assert re.split(r" {2,}", plain) == [
        "batch alone",
        "89.07 ± 0.25 (384)",
        "88.97 ± 0.25 (96)",
        "88.08 ± 0.25 (12)",
    ]
    assert "1 of 3 missing" in linear and "1 of 3 diverged" in linear
    assert re.split(r" {2,}", lines_of(text, "  in the source")[0].strip()) == [
        "in the source",
        "88.33",
        "-",
        "-",
    ]


def test_the_text_begins_with_the_verdict_and_ends_with_the_warnings(result):
    text = as_text(result)
    assert text.startswith(result["verdict"][0])
    assert text.rstrip().splitlines()[-1].strip().endswith("Widen the grid with --tune.")
    assert max(map(len, text.splitlines())) <= 110
    for one in result["comparisons"]:
        assert f"{one['difference']:+.2f}" in text and one["verdict"] in text
    assert "75.0" not in text  # no single evaluation


def test_censored_runs_stand_in_the_table_of_the_target(tmp_path):
    study = make_study(tmp_path / "s", target=80.0, batches=[32, 128])
    for cell in study.cells():
        never = cell.arm == "plain" and cell.batch == 128 and cell.seed
        add_run(tmp_path / "s", cell, [70.0] if never else [70.0, 80.0])
    text = as_text(study_result(tmp_path / "s"))
    assert re.split(r" {2,}", lines_of(text, "batch alone  ")[1])[1:] == ["128", "32, 2 censored"]


def test_the_markdown_holds_the_same_cells(result):
    text = as_markdown(result)
    assert "| batch | 32 | 128 | 1,024 |\n| --- | ---: | ---: | ---: |" in text
    assert "| batch alone | 89.07 ± 0.25 (384) | 88.97 ± 0.25 (96) | 88.08 ± 0.25 (12) |" in text
    assert text.startswith("- Of 7 comparisons")
    assert "| plain at 32 | base\\_lr |" in text or "| plain at 32 | base_lr |" in text


def test_a_title_from_a_file_can_not_break_the_table(tmp_path):
    arms = {"plain": {"title": "a | b\x1b[2J <b>"}, "linear": {}}
    study = make_study(tmp_path / "s", arms=arms)
    fill(tmp_path / "s", study, lambda cell: 90.0)
    found = study_result(tmp_path / "s")
    assert "a \\| b" in as_markdown(found)
    assert "<b>" not in as_markdown(found)
    assert "\x1b" not in as_text(found) + as_markdown(found)


def test_the_csv_has_a_row_a_place_with_its_difference_from_the_baseline(result):
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [(row["arm"], row["batch"]) for row in rows] == [
        (one["arm"], str(one["batch"])) for one in result["table"]
    ]
    assert float(rows[1]["difference_from_baseline"]) == pytest.approx(-0.096)
    assert rows[0]["difference_from_baseline"] == rows[0]["verdict"] == ""  # the baseline
    assert (rows[2]["verdict"], rows[5]["diverged"]) == ("loss", "1")
    assert float(rows[0]["seed_2"]) == pytest.approx(89.168)
    assert rows[4]["seed_0"] == ""  # missing


def test_a_csv_replaces_its_like_and_nothing_else(result, tmp_path):
    own, other = tmp_path / "own.csv", tmp_path / "other.csv"
    own.write_text(as_csv(result))
    other.write_text("my,table\n")
    writable(own, "--csv", own=TABLE_FILE)
    with pytest.raises(InputError):
        writable(other, "--csv", own=TABLE_FILE)


def test_a_study_without_results_has_csvs_of_dashes(tmp_path):
    make_study(tmp_path / "s")
    found = study_result(tmp_path / "s")
    assert "-, 3 of 3 missing" in as_text(found)
    assert "-, 3 of 3 missing" in as_markdown(found)
    assert len(as_csv(found).splitlines()) == 7
