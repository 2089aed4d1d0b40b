"""The notebooks of `examples/`: what they type is right, and they run offline."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from photographs import make_photographs, make_weights
from runs_of_recipe import run

from lbaccel.recipe.settings import read_settings

TOP = Path(__file__).parent.parent
NAMES = ("colab", "read_runs")
VALUES = {"MINUTES": "30", "EPOCHS": "6", "START": "", "TRAIN": "", "flags": "--seed 1"}


def cells(name, kind="code"):
    notebook = json.loads((TOP / f"examples/{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(name):
    return ["".join(cell["source"]) for cell in cells(name)]


def as_python(code):
    """The cell with `pass` for each line of the shell, which may go on over several."""
    return re.sub(r"^( *)[!%](?:.*\\\n)*.*$", r"\1pass", code, flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_python_and_no_output(name):
    notebook = json.loads((TOP / f"examples/{name}.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in cells(name):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse(as_python("".join(cell["source"])))
    assert [cell for cell in cells(name) if cell["metadata"].get("tags") == ["parameters"]]
    assert cells(name, "markdown")[0]["source"][0].startswith("# ")


def commands(name):
    lines = re.findall(r"^ *!((?:.*\\\n)*.*)$", "\n".join(source(name)), re.MULTILINE)
    for line in lines:
        filled = re.sub(r"\{([^{}]+)\}", lambda found: VALUES.get(found[1], "a"), line)
        yield shlex.split(filled.replace("\\\n", " "))


@pytest.mark.parametrize("name", NAMES)
def test_each_command_of_a_notebook_is_one_that_there_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("epochs: 3\n")  # the recipe of --config
    typed = list(commands(name))
    names = [words[1] for words in typed]
    expected = {"colab": ["start", "train", "eval", "predict", "export", "predict"]}
    assert names == expected.get(name, ["train"])
    for program, command, *flags in typed:
        assert program == "lbaccel"
        if command == "train":
            read_settings(flags)
            assert flags[flags.index("--log-with") :][:2] == ["--log-with", "run_folder"]
            continue
        parser = argparse.ArgumentParser(exit_on_error=False)
        import_module(f"lbaccel.commands.{command}").add_arguments(parser)
        parser.parse_args(flags)


def test_the_drive_is_mounted_only_where_google_colab_can_be_imported():
    (tree,) = (ast.parse(as_python(code)) for code in source("colab") if "google.colab" in code)
    (attempt,) = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
    assert ast.unparse(attempt.body[0]) == "from google.colab import drive"
    assert ast.unparse(attempt.handlers[0].type) == "ImportError"
    assert ast.unparse(attempt.orelse[0]).startswith("drive.mount(")
    assert ast.unparse(tree).count("google") == 1


@pytest.mark.parametrize("name", NAMES)
def test_readme_and_pages_link_a_notebook(name):
    for page in ("README.md", "docs/index.md", "docs/after_the_run.md"):
        assert f"examples/{name}.ipynb" in (TOP / page).read_text(encoding="utf-8"), page


def executed(name, folder, *parameters, until=None):
    """The text, the number of pictures and all outputs of the notebook, run in `folder`."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(TOP / f"examples/{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n" + "\n".join(parameters)
    if until is not None:
        (last,) = (i for i, cell in enumerate(notebook.cells) if until in cell.source)
        notebook.cells = notebook.cells[: last + 1]
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    text = "".join(out.get("text", "") for out in outputs)
    assert not re.search(r"\r(?!\n)", text) and len(text.splitlines()) < 200, text
    pictures = sum("image/png" in out.get("data", {}) for out in outputs)
    return text, pictures, outputs


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A place for the kernel's own files, and `lbaccel` as a command of this interpreter."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    command = tmp_path / "bin" / "lbaccel"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lbaccel "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(TOP))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_training_goes_on_after_a_lost_session_and_the_notebook_comes_to_its_end(kernel, tmp_path):
    home = tmp_path / "home"
    made = make_photographs(tmp_path / "made", train=12, val=4)
    for path in made.rglob("*.png"):  # one folder a class
        target = home / "photos" / path.parent.name / f"{path.parent.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    weights = make_weights("test_resnet", tmp_path)
    start = f"--checkpoint {weights} --img-size 32 --workers 0 --epochs 4 --global-batch-size 8"
    given = (f"START = {start!r}", "MINUTES = 0.5")
    train = "!lbaccel train"
    said, *_ = executed("colab", home, *given, 'TRAIN = "--max-hours 1e-6"', until=train)
    assert "first figure" in said and "stopped: the time limit" in said
    (folder,) = (home / "runs").iterdir()
    lost = {"process": 1, "host": "lost", "kernel": "lost", "started": "2026-01-01 00:00:00"}
    (folder / ".writer.json").write_text(json.dumps(lost))

    said, pictures, _ = executed("colab", home, *given)
    assert "the recipe of an earlier session" in said and "resume: " in said
    assert list((home / "runs").iterdir()) == [folder]
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert pictures >= 4  # top-1, confusion, mistakes, predictions
    assert "top-1" in said and (home / "predictions.csv").exists()
    assert (home / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_without_photographs_the_notebook_trains_on_digits(kernel, tmp_path):
    train = 'TRAIN = "--max-updates 3 --val-batch-size 359"'
    said, *_ = executed("colab", tmp_path, train, until="!lbaccel train")
    assert "data: digits" in said and "update 3/3, 100 %" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_runs_are_read_into_tables_and_curves(kernel, tmp_path):
    for size in (256, 512):
        for seed in (1, 2):
            flags = ("--global-batch-size", size, "--seed", seed, "--eval-every", 0.5)
            run(*flags, output=tmp_path / "runs")
    said, pictures, outputs = executed("read_runs", tmp_path, "EPOCHS = 1")
    text = said + "".join(out.get("data", {}).get("text/plain", "") for out in outputs)
    assert pictures == 1 and "done" in text and "95 % interval" in text
    assert text.count("lbaccel_tiny-gbs256") == text.count("lbaccel_tiny-gbs512") == 2
