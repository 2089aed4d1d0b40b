"""Where a figure may be written, and tables of text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lbaccel.errors import InputError
from lbaccel.launch import drop_foreign_plot_backend
from lbaccel.runs.columns import columns
from lbaccel.runs.figures import new_figure, save
from lbaccel.runs.outputs import writable


def test_a_place_is_tried_without_a_trace(tmp_path):
    there = tmp_path / "there.png"
    there.write_bytes(b"mine")
    assert writable(there, "--plot") == there and there.read_bytes() == b"mine"
    writable(tmp_path / "new.png", "--plot")
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


def test_missing_folders_are_made_where_that_is_asked_for(tmp_path):
    path = tmp_path / "a" / "b" / "x.png"
    with pytest.raises(InputError, match=r"--csv .*/x.png can't be written: there is no folder"):
        writable(path, "--csv")
    assert not path.parent.exists()
    writable(path, "--csv", parents=True)
    assert path.parent.is_dir() and not path.exists()


def test_a_file_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"mine")
    plain = type(path).open

    def read_only(self, mode="r", *rest, **options):
        if self == path and mode != "r":
            raise OSError(30, "Read-only file system", str(path))
        return plain(self, mode, *rest, **options)

    monkeypatch.setattr(type(path), "open", read_only)
    with pytest.raises(InputError, match=r"can't be written: Read-only file system\. Use"):
        writable(path, "--plot")


def test_a_figure_has_its_size_at_120_pixels_an_inch(tmp_path):
    figure = new_figure(2, 1.5)
    figure.add_subplot()
    save(figure, tmp_path / "x.png")
    header = (tmp_path / "x.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == (240, 180)


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("a", "bb", "c"), ("dddd", "e", "")]
    assert columns(rows) == ["a     bb  c", "dddd  e"]
    assert columns(rows, "r") == ["   a  bb  c", "dddd   e"]
    assert columns(rows, "lr") == ["a     bb  c", "dddd   e"]
    assert columns(rows, "lrl") == ["a     bb  c", "dddd   e"]
    assert columns(rows, at_least=(6, 0)) == ["a       bb  c", "dddd    e"]
    assert columns([]) == []


@pytest.mark.parametrize(
    ("named", "stays"),
    [("module://no_such_module.backend", False), ("module://json.decoder", True), ("agg", True)],
)
def test_a_notebooks_way_to_draw_is_kept_where_it_can_be_imported(named, stays, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", named)
    drop_foreign_plot_backend()
    assert os.environ.get("MPLBACKEND") == (named if stays else None)


def test_a_figure_is_drawn_under_a_notebook_of_another_environment():
    code = "from lbaccel.runs.figures import new_figure; print(new_figure(2, 1).get_figwidth())"
    env = {**os.environ, "MPLBACKEND": "module://no_such_module.backend"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "2.0\n", done.stderr
