"""`lbaccel start`: each choice has a reason, a pin is kept, and the printed line is the file."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from photographs import make_photographs, make_weights

from lbaccel import cli, train
from lbaccel.errors import InputError
from lbaccel.product import start as module
from lbaccel.product.features import FirstFigure
from lbaccel.product.scan import Scan
from lbaccel.product.start import Start, start
from lbaccel.recipe.settings import read_settings
from lbaccel.stability.range_test import LrRange

SMALL = ("--img-size", "32", "--workers", "0", "--log-with", "run_folder")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos():
    make_photographs("photos")
    return make_weights("test_resnet")


def started(*flags, minutes=5.0):
    settings, _ = read_settings(["--data", "folder:photos", *SMALL, *map(str, flags)])
    said: list[str] = []
    return start(settings, minutes=minutes, say=said.append), said


def test_the_printed_line_and_the_file_are_one_recipe_that_trains(photos, capsys):
    assert cli.main(["start", "photos", "--checkpoint", str(photos), *SMALL]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("lbaccel train ")]
    typed, _ = read_settings(shlex.split(line)[2:])
    of_file, _ = read_settings(["--config", "config.yaml"])
    assert typed.values() == of_file.values()
    assert typed.model.model == "test_resnet" and typed.model.pretrained
    assert typed.batch.norm_batch_size == "frozen"
    text = Path("config.yaml").read_text()
    rows = text.splitlines()[1:]
    assert all("  # " in row for row in rows) and len(rows) == len(yaml.safe_load(text))
    assert "first figure: 100.0 % top-1 (24 of 24 validation images" in said
    assert train.main([*shlex.split(line)[2:], "--max-updates", "2"]) == 0


def test_run_trains_at_once(photos):
    flags = ["--checkpoint", str(photos), *SMALL, "--max-updates", "2"]
    assert cli.main(["start", "photos", *flags, "--run"]) == 0
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "done"


def test_each_pin_is_kept_and_told_as_the_users(photos):
    pins = {
        "global_batch_size": 48, "base_lr": 0.002, "epochs": 3.0, "norm_batch_size": 16,
        "optimizer": "adamw", "model": "test_resnet",
    }  # fmt: skip
    flags = [text for name, v in pins.items() for text in (f"--{name.replace('_', '-')}", str(v))]
    found, said = started("--checkpoint", photos, *flags)
    assert {name: found.settings.value(name) for name in pins} == pins
    assert not {choice.name for choice in found.choices} & pins.keys()
    of_pins = [line for line in found.yaml().splitlines() if line.split(":")[0] in pins]
    assert len(of_pins) == len(pins) and all(line.endswith("# yours") for line in of_pins)
    assert any("large batches do not help here" in line for line in said)  # 72 / 48 x 3 updates


def test_a_file_pins_what_it_names_a_default_too_and_is_named_as_the_reason(photos, capsys):
    Path("a.yaml").write_text("epochs: 3\nseed: 4\n")
    Path("b.yaml").write_text("epochs: 20\nbase_lr: null\nnorm_batch_size: 16\n")
    files = ["--config", "a.yaml", "--config", "b.yaml"]
    line = ["start", *files, "photos", "--checkpoint", str(photos), *SMALL, "--out", "o.yaml"]
    assert cli.main(line) == 0
    settings, _ = read_settings(["--config", "o.yaml"])
    assert (settings.rate.epochs, settings.run.seed) == (20.0, 4)  # 20 is the default, and pinned
    assert settings.batch.norm_batch_size == 16
    assert settings.rate.base_lr is not None, "null asks for nothing, so it is chosen"
    rows = {
        row.split(":")[0]: row.split("  # ")[-1] for row in Path("o.yaml").read_text().splitlines()
    }
    assert rows["epochs"] == rows["norm_batch_size"] == "yours, of b.yaml"
    assert rows["seed"] == "yours, of a.yaml" and rows["img_size"] == "yours"
    (typed,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("lbaccel train ")]
    assert read_settings(shlex.split(typed)[2:])[0].values() == settings.values()


def test_what_is_pinned_can_be_looked_at_before_anything_else(photos, capsys):
    Path("a.yaml").write_text("epochs: 3\n")
    flags = ["--config", "a.yaml", "--seed", "2", "--print-config"]
    assert cli.main(["start", "absent", *flags]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["epochs"] == ["3.0", "a.yaml"] and rows["seed"] == ["2", "flag"]
    assert rows["data"] == ["folder:absent", "flag"]
    assert rows.keys() == {"data", "epochs", "seed"}  # start itself chooses all else
    assert not Path("config.yaml").exists()


def test_a_recipe_by_name_pins_too(capsys):
    assert cli.main(["start", "absent", "--config", "finetune-small", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.split() == [
        "optimizer", "adamw", "recipe", "finetune-small"
    ]]  # fmt: skip


def test_the_config_of_a_run_pins_what_was_asked_for_there_alone(photos):
    Path("c.yaml").write_text(
        "data: digits\nepochs: 20\nseed: 3\nplan: {}\norigin: {epochs: default, seed: flag}\n"
    )
    from lbaccel.recipe.settings import from_configs

    pinned = from_configs(["c.yaml"], defaults_too=True).given
    assert "seed" in pinned and "data" in pinned and "epochs" not in pinned


def test_a_network_without_batch_norm_takes_adamw(photos):
    found, _ = started("--checkpoint", make_weights("test_vit"))
    assert found.settings.optimizer.optimizer == "adamw"
    assert found.settings.batch.norm_batch_size is None
    assert found.settings.rate.base_lr is not None and found.settings.rate.base_lr <= 1e-4


def test_the_file_of_somebody_else_is_kept(photos, capsys):
    Path("config.yaml").write_text("mine: 1\n")
    assert cli.main(["start", "photos", "--checkpoint", str(photos), *SMALL]) == 2
    assert "is there, and is no recipe of lbaccel start" in capsys.readouterr().err
    assert Path("config.yaml").read_text() == "mine: 1\n"
    assert (
        cli.main(["start", "photos", "--checkpoint", str(photos), *SMALL, "--out", "o.yaml"]) == 0
    )
    assert (
        cli.main(["start", "photos", "--checkpoint", str(photos), *SMALL, "--out", "o.yaml"]) == 0
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["photos", "--minutes", "0"], "--minutes"),
        (["photos", "--minutes", "nan"], "--minutes"),
        (["absent"], "absent"),
        (["photos", "--checkpoint", "weights.pth"], "does not say which network it is of"),
        (["photos", "--model", "test_resnett"], "Nearest: test_resnet"),
        (["photos", "--resume", "auto"], "go on with lbaccel train --resume"),
        (["photos", "--epoch", "3"], "--epochs"),
    ],
)
def test_what_can_not_be_started_is_a_sentence(flags, says, photos, capsys):
    shutil.copy(photos, "weights.pth")
    assert cli.main(["start", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert not Path("config.yaml").exists()


def test_weights_that_are_nowhere_are_named_with_their_place(photos, capsys, monkeypatch):
    monkeypatch.setattr("lbaccel.product.weights.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lbaccel.product.weights.try_to_load_from_cache", lambda *_: None)
    assert cli.main(["start", "photos", "--model", "test_resnet", *SMALL]) == 2
    error = capsys.readouterr().err
    for part in ("timm/test_resnet.r160_in1k", "model.safetensors", "--checkpoint FILE"):
        assert part in error


# -- the choices, from measurements that are given ------------------------------------------------


def measured(monkeypatch, *, num_train, seconds_an_image, tested=None, flags=()):
    """The choices for a set of this size whose training costs so much an image."""
    settings, _ = read_settings(["--data", "folder:photos", *flags])
    found = Start(settings, Scan({"a": num_train // 2, "b": num_train - num_train // 2}, 100))
    found.first = FirstFigure(50, 100, 100, seconds_an_image / 3.5, 10.0)
    said: list[str] = []
    monkeypatch.setattr(module, "_range_test", lambda *_, **__: (tested, seconds_an_image))
    monkeypatch.setattr(module, "has_batch_norm", lambda _: True)
    module._choose_recipe(found, None, module.one_device())
    source = type("S", (), {"train": range(num_train), "val": range(100)})
    found.seconds = module._choose_by_updates(
        found, source, seconds=600.0, share=900.0, say=said.append
    )
    module._warn_of_large_batch(found, say=said.append)
    return found, said


@pytest.mark.parametrize(("num_train", "size"), [(250, 16), (800, 32), (3000, 64), (50_000, 128)])
def test_the_batch_leaves_updates_to_a_small_set(monkeypatch, num_train, size):
    found, said = measured(monkeypatch, num_train=num_train, seconds_an_image=0.001)
    assert found.settings.batch.global_batch_size == size and said == []
    assert found.settings.batch.first_size in (16, 128) or num_train / size >= 25


def test_the_epochs_fill_the_time_and_not_more(monkeypatch):
    """800 images x 0.1 s and 100 x 0.0286 s are 82.9 s an epoch; 0.9 x 600 s hold 6 of them."""
    found, _ = measured(monkeypatch, num_train=800, seconds_an_image=0.1)
    assert found.settings.rate.epochs == 6 and found.seconds == pytest.approx(6 * 82.857, rel=1e-3)
    found, _ = measured(monkeypatch, num_train=800, seconds_an_image=0.001)
    assert found.settings.rate.epochs == module.MOST_EPOCHS
    found, _ = measured(monkeypatch, num_train=800, seconds_an_image=10.0)
    (choice,) = [c for c in found.choices if c.name == "epochs"]
    assert choice.value == 1 and "more than the time given" in choice.reason


def test_minutes_that_were_pinned_leave_the_epochs_to_the_training(monkeypatch):
    flags = ("--max-minutes", "5", "--global-batch-size", "800")
    found, said = measured(monkeypatch, num_train=800, seconds_an_image=0.1, flags=flags)
    assert found.seconds == 300 and "--epochs" not in found.flags()
    assert said == []  # how many updates there will be is not known here


def range_up_to(largest):
    """A range test whose smoothed loss came down until the rate `largest`."""
    lrs = tuple(largest * 2.0**k for k in range(-4, 3))
    smoothed = (1.5, 1.4, 1.2, 0.9, 0.5, 1.0, 4.0)
    return LrRange(lrs, smoothed, smoothed, 1.6, "diverged", lrs[-1], 32)


def test_a_rate_above_what_the_range_test_bore_is_lowered_and_a_pinned_one_is_told(monkeypatch):
    low = range_up_to(0.0002)
    found, said = measured(monkeypatch, num_train=800, seconds_an_image=0.01, tested=low)
    assert found.settings.rate.base_lr == pytest.approx(low.suggested_lr) and said == []
    (choice,) = [c for c in found.choices if c.name == "base_lr"]
    assert "the range test bore 0.0002, not 0.0003" in choice.reason
    flags = ("--base-lr", "0.05")
    found, said = measured(
        monkeypatch, num_train=800, seconds_an_image=0.01, tested=low, flags=flags
    )
    assert found.settings.rate.base_lr == 0.05
    assert said == ["warning: --base-lr 0.05 is above 0.0002, which the range test bore"]
    high = replace(low, lrs=tuple(1000 * lr for lr in low.lrs))
    found, _ = measured(monkeypatch, num_train=800, seconds_an_image=0.01, tested=high)
    assert found.settings.rate.base_lr == 3e-4  # AdamW under frozen BatchNorm


def test_a_large_batch_that_was_asked_for_is_kept_and_told(monkeypatch):
    flags = ("--global-batch-size", "2048")
    found, said = measured(monkeypatch, num_train=800, seconds_an_image=0.1, flags=flags)
    assert found.settings.batch.global_batch_size == 2048
    (line,) = said
    assert "a batch of 800 leaves 6 updates: large batches do not help here" in line


def test_files_that_can_not_be_read_are_left_out_and_told(photos):
    Path("photos/train/red/000.png").write_bytes(b"")
    Path("photos/val/blue/001.png").write_bytes(b"no image")
    found, said = started("--checkpoint", photos)
    assert found.settings.data.skip_corrupt and "--skip-corrupt" in found.flags()
    assert any("2 files are no readable image" in line for line in said)
    assert train.main([*found.flags(), "--max-updates", "1"]) == 0
    (run,) = Path("runs").iterdir()
    assert len(json.loads((run / "skipped.json").read_text())["skipped"]) == 2


def test_one_class_is_refused_before_any_work(photos):
    make_photographs("one", classes={"blue": (0, 0, 200)})
    settings, _ = read_settings(["--data", "folder:one", "--checkpoint", str(photos)])
    with pytest.raises(InputError, match="one class, 'blue'"):
        start(settings, minutes=5.0, say=print)


@pytest.mark.parametrize("train_as", ["full", "head", "head+norms", "bias+head"])
def test_the_rate_is_the_one_that_training_takes(photos, train_as):
    from lbaccel.recipe.rate import rate_of

    found, _ = started("--checkpoint", photos, "--train", train_as, minutes=0.5)
    by_default = found.settings.with_values({"base_lr": None})
    taken = rate_of(by_default, global_batch_size=256).base_lr
    assert found.settings.rate.base_lr <= taken
    if not any("range test bore" in c.reason for c in found.choices):
        assert found.settings.rate.base_lr == taken


def test_flags_may_come_before_the_folder(photos, capsys):
    flags = ["--img_size", "32", "--checkpoint", str(photos), "--workers", "0"]
    assert cli.main(["start", *flags, "photos"]) == 0
    assert "--data folder:photos" in capsys.readouterr().out
