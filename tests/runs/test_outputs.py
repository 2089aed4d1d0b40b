"""Files that commands write where the user says: links, folders and foreign files stay."""

from __future__ import annotations

import json

import pytest

from lbaccel import cli
from lbaccel.configs.shipped import copy, find
from lbaccel.errors import InputError
from lbaccel.planning.report import check_report
from lbaccel.runs.figures import check_plot, new_figure, save
from lbaccel.runs.folder import atomic_write_text


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LBACCEL_CALIBRATION", str(tmp_path / "none.json"))
    (run := tmp_path / "run").mkdir()
    row = {"update": 1, "samples_seen": 8, "val/top1": 50.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")


TRANSFER = "transfer --base-batch-size 8 --global-batch-size 16 --base-lr 0.1 --optimizer sgd"
REPLICATE = "replicate --per-gpu-batch 8 --gpus 2 --no-plan --force"
PLAN = "plan --model resnet10t --global-batch-size 8"
WRITERS = {
    "compare --csv": ("compare run --csv", "x.csv"),
    "compare --plot": ("compare run --plot", "x.png"),
    "advise --plot": ("advise run --plot", "x.png"),
    "replicate --out": (f"{REPLICATE} --out", "x.yaml"),
    "transfer --out": (f"{TRANSFER} --out", "x.yaml"),
    "plan --report": (f"{PLAN} --report", "x.json"),
    "plan --plot": (f"{PLAN} --sweep --plot", "x.svg"),
    "calibrate --output": ("calibrate --seconds 0.01 --output", "x.json"),
}


def link_to_nowhere(path, folder):
    path.symlink_to(folder / "elsewhere")


def link_to_a_file(path, folder):
    (folder / "mine").write_text("mine")
    path.symlink_to(folder / "mine")


def a_folder(path, folder):
    path.mkdir()


def a_foreign_file(path, folder):
    path.write_text("mine")


@pytest.mark.parametrize("obstacle", [link_to_nowhere, link_to_a_file, a_folder, a_foreign_file])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_not_its_own_stays_and_a_sentence_says_why(name, obstacle, tmp_path, capsys):
    command, file = WRITERS[name]
    obstacle(tmp_path / file, tmp_path)
    there = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert cli.main([*command.split(), file]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and file in error and len(error.splitlines()) == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == there


@pytest.mark.parametrize("name", ["compare --csv", "compare --plot", "replicate --out"])
def test_its_own_earlier_file_is_replaced(name, tmp_path):
    command, file = WRITERS[name]
    assert cli.main([*command.split(), file]) == 0
    first = (tmp_path / file).stat()
    assert cli.main([*command.split(), file]) == 0
    assert (tmp_path / file).stat().st_ino != first.st_ino
    assert not list(tmp_path.glob(".*.tmp"))


def figure():
    made = new_figure(1, 1)
    made.add_subplot().plot([1, 2])
    return made


@pytest.mark.parametrize("form", ["png", "svg", "pdf", "ps", "eps"])
def test_a_figure_of_lbaccel_is_known_and_one_of_another_program_is_not(form, tmp_path):
    path = tmp_path / f"x.{form}"
    save(figure(), path)
    check_plot(path)
    figure().savefig(path)
    with pytest.raises(InputError, match=r"it is there, and is no figure of lbaccel\. Use another"):
        check_plot(path)
    path.write_bytes(b"")
    check_plot(path)  # an empty file holds nothing to lose


def test_a_format_without_a_mark_is_never_replaced(tmp_path):
    save(figure(), tmp_path / "x.jpg")
    with pytest.raises(InputError, match="no figure of lbaccel"):
        check_plot(tmp_path / "x.jpg")


@pytest.mark.parametrize("obstacle", [link_to_nowhere, link_to_a_file, a_folder])
@pytest.mark.parametrize("force", [False, True])
def test_a_config_is_written_through_no_link(obstacle, force, tmp_path):
    (tmp_path / "ds_configs").mkdir()
    obstacle(tmp_path / "ds_configs" / "zero2.json", tmp_path)
    with pytest.raises(InputError, match=r"zero2.json can't be written: it is a"):
        copy([find("zero2")], tmp_path, force=force)
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "accelerate_configs").exists()
    if (tmp_path / "mine").exists():
        assert (tmp_path / "mine").read_text() == "mine"


def test_a_report_is_written_through_no_link(tmp_path):
    link_to_nowhere(tmp_path / "x.json", tmp_path)
    with pytest.raises(InputError, match="it is a link"):
        check_report(tmp_path / "x.json")


def test_a_link_that_comes_meanwhile_is_replaced_and_not_followed(tmp_path):
    link_to_a_file(tmp_path / "x", tmp_path)
    atomic_write_text(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").read_text() == "new"
