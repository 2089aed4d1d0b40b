"""A checkpoint that can't be written, and a plot that can't be drawn: what each costs the run."""

from __future__ import annotations

import errno
import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forks import run_forked, values
from runs_of_recipe import newest, run

from lbaccel import RunFailed
from lbaccel.recipe.saving import twice_at_most
from lbaccel.runs import session

SHORT = ["--epochs", "1", "--max-updates", "4"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(times, error, *, first=0):
    """Fails `times` times, after `first` calls that go well, in place of safetensors' writer."""
    plain, calls = safetensors.torch.save_file, [0]

    def save_file(tensors, path):
        calls[0] += 1
        if first < calls[0] <= first + times:
            raise error
        plain(tensors, path)

    return save_file


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_memory_that_runs_out_once_costs_no_checkpoint(monkeypatch):
    monkeypatch.setattr(safetensors.torch, "save_file", failing(1, OUT, first=1))
    assert newest(run(*SHORT)).name == "update_000004"


def test_memory_that_runs_out_twice_names_the_checkpoint_that_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(safetensors.torch, "save_file", failing(2, MemoryError(), first=1))
    folder = run(*SHORT, code=1)
    said = capsys.readouterr().err
    assert "memory ran out twice while a checkpoint was written (MemoryError)" in said
    assert f"update_000002 is kept. To go on: lbaccel train --resume {folder}" in said
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", "update_000002"}


def test_another_error_of_saving_is_not_tried_again():
    calls = []

    def write():
        calls.append(1)
        raise RunFailed("full")

    with pytest.raises(RunFailed, match="full"):
        twice_at_most(torch.device("cpu"))(write)
    assert len(calls) == 1


def saved_on_a_full_disk(rank):
    full = OSError(errno.ENOSPC, "No space left on device")
    safetensors.torch.save_file = failing(9, full, first=1 if rank == 0 else 99)
    said = io.StringIO()
    with redirect_stderr(said):
        run(*SHORT, output="runs", code=1)
    return said.getvalue()


def test_a_full_disk_of_the_first_rank_ends_all_ranks_with_one_message():
    first, second = values(run_forked(saved_on_a_full_disk, world_size=2, timeout=90))
    assert "the checkpoint of update 4 could not be saved" in first
    assert "No space left on device" in first and "update_000002 is kept" in first
    assert second == "", "the second rank waited in vain, or spoke too"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError(), KeyError("k")])
def test_a_plot_that_can_not_be_drawn_is_a_note(monkeypatch, capsys, error):
    def broken(folder):
        raise error

    monkeypatch.setattr(session, "plot_run", broken)
    folder = run(*SHORT)
    out = capsys.readouterr().out
    assert "note: the plots were not drawn" in out and type(error).__name__ in out
    assert '"status": "done"' in Path(folder, "summary.json").read_text()
