"""The recipes that come with lbaccel: found by name, each value with its reason, each one runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from photographs import make_weights

from lbaccel import cli, train
from lbaccel.errors import InputError
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.presets import find_config, listed, recipes
from lbaccel.recipe.settings import make_parser, read_settings, show_settings

NAMES = ("finetune-large", "finetune-small", "large-batch-adamw", "scratch-32px")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_four_are_there():
    assert tuple(recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_value_has_its_reason_on_its_line_and_decides_the_result(name):
    text = recipes()[name].read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(rows) == len(yaml.safe_load(text))
    for row in rows:
        key, _, rest = row.partition(":")
        assert OPTIONS[key].contract or key == "epochs"
        assert len(rest.partition("  # ")[2]) > 3, row
    assert max(map(len, text.splitlines())) <= 105
    for page in re.findall(r"docs/(\S+?\.md)", text):
        assert (DOCS / page).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_its_values_are_read_and_their_origin_is_its_name(name):
    settings, _ = read_settings(["--config", name])
    values = yaml.safe_load(recipes()[name].read_text(encoding="utf-8"))
    for key, value in values.items():
        found = settings.value(key)
        assert (list(found) if isinstance(found, tuple) else found) == value
        assert settings.origin(key) == f"recipe {name}"
    assert settings.notes == ()
    assert f"recipe {name}" in show_settings(settings)


SMALL = {  # all that a laptop is too slow for; batch, rate, schedule and augmentation stay
    "finetune-large": ("--model", "test_resnet", "--img-size", "32", "--data", "synthetic:4x32"),
    "finetune-small": ("--model", "test_resnet", "--img-size", "32", "--data", "synthetic:4x32"),
    "large-batch-adamw": (
        *("--model", "test_vit", "--img-size", "32", "--data", "synthetic:4x32"),
        *("--global-batch-size", "64"),
    ),
    "scratch-32px": ("--model", "test_resnet", "--data", "synthetic:4x32"),
}


@pytest.mark.filterwarnings("ignore:.*above a tenth of the training set")
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, capsys):
    flags = [*SMALL[name], "--workers", "0", "--dry-run"]
    if name.startswith("finetune"):
        flags += ["--checkpoint", str(make_weights("test_resnet"))]
    assert train.main(["--config", name, *flags]) == 0, capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_file_of_that_name_in_the_current_folder_wins_and_it_is_said(capsys):
    for own in ("finetune-small", "finetune-small.yaml"):
        Path(own).write_text("seed: 7\n")
        settings, _ = read_settings(["--config", "finetune-small"])
        assert settings.run.seed == 7 and settings.model.pretrained is False
        (note,) = settings.notes
        assert note == (
            f"--config finetune-small: {own} of this folder is read, not lbaccel's recipe of that "
            "name"
        )
        assert settings.origin("seed") == own
        Path(own).unlink()
    Path("scratch-32px.yaml").write_text("seed: 7\n")
    flags = ["--data", "digits", "--model", "test_resnet", "--workers", "0", "--dry-run"]
    assert train.main(["--config", "scratch-32px", *flags]) == 0
    assert "scratch-32px.yaml of this folder is read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetune-smal", ["neither a file here nor a recipe", "Did you mean finetune-small?"]),
        ("nothing", ["'nothing'", "Recipes: finetune-large, finetune-small, "]),
        ("nothing.yaml", ["nothing.yaml can't be read", "No such file"]),
        ("there/finetune-small", ["there/finetune-small can't be read"]),
        ("x" * 5000, ["neither a file here nor a recipe"]),
    ],
)
def test_a_name_of_nothing_is_refused(text, says):
    with pytest.raises(InputError) as caught:
        read_settings(["--config", text])
    assert all(part in str(caught.value) for part in says) and len(str(caught.value)) < 500


def test_a_recipe_is_found_from_any_folder_and_its_path_is_not_shown():
    found = find_config("finetune-small")
    assert found.path.is_absolute() and found.origin == "recipe finetune-small" and not found.note


def test_the_help_lists_them_with_their_first_lines(capsys):
    text = listed()
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  {name} +{re.escape(first)}$", text, re.M)
    for ask in (["train", "--help"], ["train", "--help", "all"], ["start", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(ask)
        assert text in capsys.readouterr().out
    assert text in make_parser().format_help()
