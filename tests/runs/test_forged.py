"""Checkpoints with a right manifest and wrong content: a sentence that names file and part."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat

import pytest
import runs_of_recipe
import safetensors.torch
import torch
from runs_of_recipe import newest, whole

from lbaccel import cli, train
from lbaccel.models import read_tensors, read_weights
from lbaccel.runs.checkpoints import read_state, save_checkpoint
from lbaccel.runs.folder import written_beside

SHORT = ("--max-updates", "2")


def forge(run, name, content):
    """Write a file of the newest checkpoint, and its checksum into the manifest."""
    checkpoint = newest(run)
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint / name


@pytest.fixture
def run(tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole(*SHORT), copy, symlinks=True)
    return copy


def as_torch(value, folder):
    torch.save(value, folder / "x.pt")
    return (folder / "x.pt").read_bytes()


def said_by_resume(run, capsys):
    """The last line of a resume, which exits with 2."""
    capsys.readouterr()
    assert (
        train.main([*runs_of_recipe.BASE, "--resume", str(run), "--output", str(run.parent)]) == 2
    )
    return capsys.readouterr().err.splitlines()[-1]


STATES = {
    "no part is a mapping": ("counters", lambda state: 3),
    "a number is text": ("counters", lambda state: {**state, "num_updates": "soon"}),
    "a key is gone": ("scheduler", lambda state: {}),
    "a list is a number": ("log", lambda state: {**state, "window": 7}),
    "groups are missing": ("optimizer", lambda state: {"state": {}, "param_groups": []}),
    "groups are no mappings": ("optimizer", lambda state: {"state": {}, "param_groups": [1]}),
    "a number overflows": ("loader", lambda state: {**state, "next_update": float("inf")}),
}


@pytest.mark.parametrize("case", STATES)
def test_a_forged_part_is_named_with_its_file(case, run, tmp_path, capsys):
    part, forged = STATES[case]
    state = read_state(newest(run))
    file = forge(run, "state.pt", as_torch({**state, part: forged(state[part])}, tmp_path))
    line = said_by_resume(run, capsys)
    assert line.startswith(f"error: {file} holds a state of {part!r} that does not fit this run")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps(Evil()), pickle.dumps([1])], ids=range(4)
)
def test_a_state_that_torch_refuses_is_a_sentence(content, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = forge(run, "state.pt", content)
    assert str(file) in said_by_resume(run, capsys)
    assert not (tmp_path / "executed").exists()


def header(content):
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


TENSORS = [
    b"",
    b"\xff" * 8,
    header({"x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}),
    header({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + b"abcd",
    header({"x\x1b[2J": {"dtype": "F32", "shape": "a", "data_offsets": [0, 4]}}) + b"abcd",
]


@pytest.mark.parametrize("content", TENSORS, ids=range(len(TENSORS)))
def test_forged_tensors_are_a_sentence_wherever_they_are_read(content, run, tmp_path, capsys):
    file = forge(run, "model.safetensors", content)
    assert f"{file} can't be read as weights" in said_by_resume(run, capsys)
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors can't be read as weights" in error and "\x1b" not in error
    for read in (read_tensors, read_weights):
        with pytest.raises(ValueError, match="can't be read as weights"):
            read(file)


def test_a_torch_file_whose_names_are_numbers_is_read(tmp_path):
    torch.save({1: torch.ones(2)}, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt")) == ["1"]


@pytest.mark.parametrize("umask, folder, file", [(0o022, 0o755, 0o644), (0o007, 0o770, 0o660)])
def test_weights_and_folders_have_the_mode_of_the_umask(umask, folder, file, tmp_path):
    before = os.umask(umask)
    try:
        path = save_checkpoint(
            tmp_path, update=1, weights={"model": {"w": torch.ones(2)}}, classes=["a"],
            preprocessing={}, state={"x": 1},
        )  # fmt: skip
        with written_beside(tmp_path / "other") as beside:
            safetensors.torch.save_file({"w": torch.ones(2)}, beside / "w.safetensors")
    finally:
        os.umask(before)
    for where in (path, tmp_path / "other"):
        assert stat.S_IMODE(where.stat().st_mode) == folder
        assert {stat.S_IMODE(one.stat().st_mode) for one in where.iterdir()} == {file}
