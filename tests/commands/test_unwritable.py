"""A `--plot` that can't be written is refused before the work, alike in every command."""

from __future__ import annotations

import tempfile

import pytest

from lbaccel import cli

# command: its flags, and the first of its work
COMMANDS = {
    "compare": ("run", "lbaccel.commands.compare.load_run"),
    "advise": ("run", "lbaccel.commands.advise.load_run"),
    "schedule": (
        "--batch-schedule lrd --global-batch-size 8 --num-samples 9 --base-lr 1 --epochs 9",
        "lbaccel.commands.schedule.compose",
    ),
    "plan": ("--model resnet10t --global-batch-size 8 --sweep", "lbaccel.commands.plan.find_plan"),
    "lr-find": ("", "lbaccel.recipe.built.built"),
}
MAKES_FOLDERS = ("schedule", "plan")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()


def refused(name, path, capsys, monkeypatch):
    flags, work = COMMANDS[name]
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it began to work"))
    assert cli.main([name, *flags.split(), "--plot", path]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


PLACES = [
    ("file/x.png", " can't be written: file is no folder. Use another file."),
    ("folder.png", " can't be written: it is a folder. Use another file."),
    ("x.txt", ": draw to one of .png, .svg, .pdf; lbaccel cannot draw a '.txt' file."),
    ("x", ": draw to one of .png, .svg, .pdf; lbaccel cannot draw a '' file."),
    ("no/x.png", " can't be written: there is no folder no. Use: mkdir -p no"),
]


@pytest.mark.parametrize(
    "name, path, why",
    [
        (name, path, why)
        for name in COMMANDS
        for path, why in PLACES
        if name not in MAKES_FOLDERS or path != "no/x.png"
    ],
)
def test_a_place_of_no_use_is_one_sentence(name, path, why, capsys, monkeypatch, tmp_path):
    there = sorted(tmp_path.rglob("*"))
    assert refused(name, path, capsys, monkeypatch) == f"error: --plot {path}{why}"
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_without_permission_is_one_sentence(name, capsys, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied", "/x/tmp1234")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    line = refused(name, "x.png", capsys, monkeypatch)
    assert line == "error: --plot x.png can't be written: Permission denied. Use another file."
