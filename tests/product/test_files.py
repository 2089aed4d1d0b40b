"""The files of an evaluation, and the folder that they go to."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from judging import make_photos, photos_and_run, run_on
from PIL import Image

from lbaccel import InputError, evaluate
from lbaccel.product import files, pictures
from lbaccel.product.metrics import figures_of

HOSTILE = ("a\nerror: b", "\x1b[2Jcat", 'd"o,g', "猫 $x", "$\\frac{", "x" * 100)


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_the_table_has_each_image_with_its_best_classes(tmp_path):
    _, folder = photos_and_run()
    result = evaluate(folder, output=tmp_path / "out")
    with (tmp_path / "out/predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columnar = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert [row["file"] for row in rows] == result.judged.names
    assert sum(row["right"] == "1" for row in rows) == result.figures.num_right
    for place, (row, other) in enumerate(zip(rows, columnar, strict=True)):
        p = result.probabilities[place]
        assert row["label"] == other["label"] == row["file"].split("/")[0]
        assert row["predicted"] == row["class_1"] == other["class_1"]
        assert float(row["probability_1"]) == pytest.approx(p.max(), abs=1e-6)
        assert other["probability_1"] == p.max()
        assert sum(other[f"probability_{i}"] for i in (1, 2, 3)) == pytest.approx(1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files.FILES)


def test_the_figures_and_where_they_come_from_are_in_the_json(tmp_path):
    data, folder = photos_and_run()
    evaluate(folder, output=tmp_path / "out")
    found = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "checkpoints/best/manifest.json").read_text())
    assert found["weights"]["sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert found["weights"]["update"] == manifest["update"]
    assert found["data"]["data"] == f"folder:{data}"
    assert found["versions"]["torch"]
    assert found["top1"] == sum(n for c, p, n in found["confusion"] if c == p) / found["n"]
    assert [row["n"] for row in found["classes"]] == [5, 5, 5]


def test_names_of_any_kind_are_escaped_and_drawn_without_a_warning(tmp_path):
    data = make_photos(tmp_path / "photos", classes=HOSTILE, train=4, val=2)
    (data / "val" / HOSTILE[0] / "0.png").rename(data / "val" / HOSTILE[0] / "n\nl\x1b[0m.png")
    folder = run_on(data, output=tmp_path / "runs")
    result = evaluate(folder, output=tmp_path / "out")
    table = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert "\x1b" not in table
    assert len(table.splitlines()) == 1 + result.figures.n == 13
    assert "a\\nerror: b/n\\nl\\x1b[0m.png" in table
    assert (
        min(*size_of(tmp_path / "out/confusion.png"), *size_of(tmp_path / "out/mistakes.png")) > 200
    )


def test_labels_have_no_formula_no_empty_box_and_a_length():
    assert pictures.drawn(["猫", "é$x", "a\tb"]) == ["\\u732b", "é\\$x", "a\\tb"]
    assert pictures.drawn(["x" * 30 + "y" * 30]) == ["x" * 11 + "…" + "y" * 12]


@pytest.mark.parametrize("outputs", [2, 21, 61])
def test_confusion_is_drawn_for_any_number_of_classes(tmp_path, outputs):
    _, folder = photos_and_run()
    result = evaluate(folder, output=tmp_path / "out")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, outputs)), rng.integers(0, outputs, 300)
    names = tuple(f"class {i}" for i in range(outputs))
    figures = figures_of(logits, labels, logits.argmax(1), classes=names, num_named=outputs)
    trained = replace(result.trained, classes=names, num_named=outputs)
    drawing = replace(result, trained=trained, figures=figures)
    pictures.draw_confusion(drawing, tmp_path / "c.png")
    assert min(size_of(tmp_path / "c.png")) > 300
    assert max(size_of(tmp_path / "c.png")) < 2400


def test_without_a_mistake_there_is_no_sheet(tmp_path):
    _, folder = photos_and_run()
    result = evaluate(folder, output=tmp_path / "out")
    perfect = replace(result.outputs, predicted=result.judged.labels)
    assert not pictures.draw_mistakes(replace(result, outputs=perfect), tmp_path / "m.png")
    assert not (tmp_path / "m.png").exists()


def test_the_most_confident_mistakes_come_first():
    _, folder = photos_and_run()
    result = evaluate(folder)
    rows = pictures._most_confident(result)
    wrong = [r for r in range(15) if result.outputs.predicted[r] != result.judged.labels[r]]
    expected = sorted(wrong, key=lambda r: -result.probabilities[r].max())
    assert rows == expected


def test_an_evaluation_replaces_an_earlier_one_and_nothing_else(tmp_path):
    _, folder = photos_and_run()
    out = tmp_path / "out"
    evaluate(folder, output=out)
    evaluate(folder, tta="flip", output=out)
    assert json.loads((out / "eval.json").read_text())["tta"] == "flip"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which no evaluation wrote"):
        evaluate(folder, output=out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/eval.json").write_text('{"made_by": "me"}')
    with pytest.raises(InputError, match=r"holds eval\.json, which no evaluation wrote"):
        evaluate(folder, output=tmp_path / "foreign")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(InputError, match="is a link"):
        evaluate(folder, output=tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        evaluate(folder, output=tmp_path / "file")
    assert (tmp_path / "foreign/eval.json").read_text() == '{"made_by": "me"}'


def test_a_folder_says_what_was_not_as_usual(tmp_path):
    _, folder = photos_and_run()
    usual = evaluate(folder).folder
    assert usual is not None
    assert usual.parent == folder / "eval"
    update = json.loads((folder / "checkpoints/best/manifest.json").read_text())["update"]
    assert usual.name == f"update_{update:06d}-val"
    average = evaluate(folder, ema=True, tta="flip").folder
    assert average is not None
    assert average.name == f"update_{update:06d}-val-ema-flip"


def test_without_pyarrow_a_sentence_says_that_there_is_csv_alone(tmp_path, monkeypatch):
    import sys

    _, folder = photos_and_run()
    result = evaluate(folder)
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    files.write_files(result, tmp_path / "out", say=said.append)
    assert said == ["note: pyarrow is not installed, so there is predictions.csv alone: "
                    "pip install pyarrow"]  # fmt: skip
    assert not (tmp_path / "out/predictions.parquet").exists()
    assert (tmp_path / "out/predictions.csv").exists()
