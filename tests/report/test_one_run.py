"""The page of a single run: events on its curves, memory, noise scale, evaluation, provenance."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from report_runs import Page, a_run_folder

from lbaccel.report.page import CURVES
from lbaccel.report.parts import report
from lbaccel.report.pictures import PictureRoom
from lbaccel.report.provenance import provenance_of
from lbaccel.runs.read import Run


@pytest.fixture
def run(tmp_path):
    return a_run_folder(tmp_path / "run")


def page_of(run):
    return Page(report([run])[0])


def changed(run, file, **values):
    content = yaml.safe_load((run / file).read_text())
    (run / file).write_text(json.dumps({**content, **values}))


def with_columns(run, **columns):
    """Each line gets a value of each function of its update."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if "train/loss" in row:
            row |= {key.replace("__", "/"): of(row["update"]) for key, of in columns.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def test_a_resume_and_a_lack_of_memory_are_marked_on_the_curves(run):
    (run / "resumes.jsonl").write_text(json.dumps({"update": 20, "plan": "2 ranks"}) + "\n")
    with_columns(run, batch__micro=lambda u: 64 if u < 30 else 32)
    found = page_of(run)
    chart = json.loads(found.scripts[CURVES])["runs-0"]
    assert [(mark["n"], mark["x"]["updates"]) for mark in chart["marks"]] == [
        ("resume", 20), ("out of memory", 30),
    ]  # fmt: skip
    assert chart["marks"][0]["x"]["samples"] == 20 * 64
    assert "resumed after update 20: 2 ranks" in found.text
    assert "the micro-batch went from 64 to 32 samples (update 30)" in found.text


def test_predicted_memory_stands_beside_measured_on_a_gpu(run):
    changed(run, "env.json", devices=["NVIDIA H200"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    changed(run, "config.yaml", plan={**config["plan"], "predicted_peak_gib": 0.55})
    with_columns(run, memory__peak_gib=lambda u: 0.5)
    found = page_of(run)
    for text in ("0.55 GiB", "0.50 GiB", "+10.0 %", "predicted 0.55 GiB"):
        assert text in found.text


def test_on_a_cpu_they_are_not_compared(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    changed(run, "config.yaml", plan={**config["plan"], "predicted_peak_gib": 0.55})
    text = page_of(run).text
    assert "0.55 GiB, of tensors alone" in text and "0.50 GiB, of the whole process" in text
    assert "predicted over measured" not in text


def test_the_noise_scale_has_its_band_and_the_run_s_batch(run):
    with_columns(
        run,
        noise__critical_batch_size=lambda u: 500.0 + u,
        noise__low=lambda u: 400.0,
        noise__high=lambda u: None if u < 10 else 900.0,
        noise__num_updates=lambda u: 20.0,
        batch__global=lambda u: 64,
    )
    chart = json.loads(page_of(run).scripts[CURVES])["noise"]
    critical, batch = chart["lines"]
    assert critical["y"][-1] == 540 and critical["lo"][-1] == 400 and critical["hi"][-1] == 900
    assert critical["hi"][0] == pytest.approx(8 * 540), "without an upper end, cut above"
    assert set(batch["y"]) == {64} and chart["y"]["kind"] == "log"


def evaluated(run, classes=3, name="update_000040-val"):
    names = [f"class {i}" for i in range(classes)]
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    triples = [[i, i, 9] for i in range(classes)] + [[0, 1, 4], [1, 2, 1]]
    of = {"n": 10, "recall": 0.9, "low": 0.6, "high": 0.98, "precision": 0.9, "f1": 0.9}
    figures = {
        "made_by": "lbaccel eval",
        "top1_pct": 84.38,
        "n": 32,
        "num_right": 27,
        "low": 0.68,
        "high": 0.93,
        "weights": {"update": 40, "ema": False},
        "data": {"description": "digits", "split": "val"},
        "classes": [{"name": name, **of} for name in names],
        "outputs": names,
        "confusion": triples,
    }
    (folder / "eval.json").write_text(json.dumps(figures))
    return folder


def test_an_evaluation_is_a_matrix_with_pairs_and_a_sentence(run):
    evaluated(run)
    found = page_of(run)
    assert "27 of 32 images are right (68.00 to 93.00; Wilson's interval" in found.text
    assert [tag for tag, a in found.elements if a.get("class") == "matrix"] == ["table"]
    cells = [a["style"] for tag, a in found.elements if a.get("style", "").startswith("--s:")]
    assert len(cells) == 9 and f"--s:{9 / 13:.3f}" in cells


def test_many_classes_are_pairs_alone(run):
    evaluated(run, classes=30)
    found = page_of(run)
    assert not [tag for tag, a in found.elements if a.get("class") == "matrix"]
    assert "Most confused pairs" in found.text


def test_classes_that_are_left_out_are_counted(run):
    evaluated(run, classes=30)
    assert "Each classclass" in page_of(run).text
    evaluated(run, classes=1203, name="update_000041-val")
    found = page_of(run)
    assert "Each class (the first 200 of 1,203; the file of the evaluation has all)" in found.text


def a_picture(path, side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_mistakes_are_embedded_and_a_large_sheet_is_made_smaller(run):
    a_picture(evaluated(run) / "mistakes.png", 1500)  # 6.7 MB, as noise is
    text, _ = report([run])
    (source,) = [a["src"] for tag, a in Page(text).elements if tag == "img"]
    assert source.startswith("data:image/webp;base64,") and len(text.encode()) < 2_000_000


def test_pictures_share_their_bytes_and_what_does_not_fit_is_left_out(tmp_path):
    small = a_picture(tmp_path / "a.png", 100)
    room = PictureRoom(600_000)
    source, _ = room.embedded(small)
    assert source is not None and source.startswith("data:image/png;base64,")
    assert room.left == 600_000 - len(source.partition(",")[2])
    room.left = 200
    assert room.embedded(small) == (None, "a.png is too large for this page, so it is left out.")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"<svg onload='x'/>"])
def test_what_is_no_picture_is_a_sentence(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    source, note = PictureRoom().embedded(tmp_path / "a.png")
    assert source is None and note.startswith("a.png can't be read")


def test_provenance_has_command_commit_versions_hardware_plan_and_origin(run):
    text = page_of(run).text
    for part in (
        "lbaccel train --model vit", "4683c41", "torch 2.15.0", "cpu (2 cores)",
        "global batch 64", "model (flag)",
    ):  # fmt: skip
        assert part in text


def test_a_run_of_a_loop_of_its_own_is_reproduced_by_its_command(run):
    (run / "config.yaml").write_text("model: mine\n")
    changed(run, "env.json", command="python mine.py --at https://me:secret@host/x")
    text = page_of(run).text
    assert "python mine.py --at https://***@host/x" in text
    assert "lbaccel train" not in text and "secret" not in text


def test_a_run_that_says_nothing_of_itself_has_no_line():
    assert provenance_of(Run("a", {}, {}, {}, "folder"), None)["reproduce"] == ""


def test_a_run_that_goes_on_says_where_it_stands_and_has_no_interval(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    changed(run, "config.yaml", **{**config, "data_identity": {"num_val": 359}})
    changed(run, "summary.json", status="running")
    text = page_of(run).text
    assert "No run has come to its end" in text and "So far its val/top1 is " in text
    assert "Wilson" not in text


def test_wilson_s_interval_is_over_the_images_and_said_to_be(run):
    changed(run, "config.yaml", data_identity={"num_val": 359, "num_train": 1438})
    assert "Over the 359 validation images its interval is" in page_of(run).text
