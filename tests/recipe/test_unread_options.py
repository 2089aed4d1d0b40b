"""Each option that is given and that nothing would read is refused, with the reason."""

from __future__ import annotations

import pytest
from PIL import Image
from runs_of_recipe import run

from lbaccel import train
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError
from lbaccel.recipe.checks import check_read, check_read_from_data
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import layered

# values of the settings that decide whether another one is read
OTHERS = {
    "pretrained": [False, True],
    "auto_augment": [None, "rand-m9"],
    "data": ["digits", "cifar10", "cifar100", "folder:images", "parquet:images"],
    "norm_batch_size": [None, 32, "global", "frozen"],
    "global_batch_size": [512, "auto"],
    "batch_schedule": [None, "bsi", "lrd"],
    "schedule": list(OPTIONS["schedule"].choices),
    # "per-N" has a base batch of its own: another one is a contradiction, and refused as such
    "lr_scaling": [x for x in OPTIONS["lr_scaling"].choices if not x.startswith("per-")],
    "warmup": list(OPTIONS["warmup"].choices),
    "optimizer": ["sgd", "adamw", "lamb", "lars", "rmsprop", "no such optimizer"],
    "loss": ["ce", "bce"],
    "teacher": [None, "runs/teacher"],
    "patience": [None, 3],
    "target": [None, 90.0],
    "ema_decay": [None, 0.9],
    "log_with": [("run_folder",), ("run_folder", "wandb"), ("wandb",)],
}
# by the documentation, in other words than the table's: (option, other): values that read it
READ_AT = {
    ("val_fraction", "data"): {"digits", "folder:images", "parquet:images"},
    ("crop_pct", "data"): {"folder:images", "parquet:images"},
    **{
        (name, "data"): {"folder:images", "parquet:images"}
        for name in ("scale", "ratio", "color_jitter", "random_erasing")
    },
    **{(name, "auto_augment"): {"rand-m9"} for name in ("scale", "ratio", "random_erasing")},
    ("class_weights", "loss"): {"ce"},
    ("teacher", "loss"): {"ce"},
    ("distill_alpha", "teacher"): {"runs/teacher"},
    ("distill_temperature", "teacher"): {"runs/teacher"},
    ("head_init", "pretrained"): {True},
    ("zero_init_last", "pretrained"): {False},
    ("monitor", "patience"): {3},
    ("monitor", "target"): {90.0},
    ("ema_norm", "ema_decay"): {0.9},
    ("ema_warmup", "ema_decay"): {0.9},
    ("test_split", "data"): {"folder:images", "parquet:images"},
    ("crop_padding_mode", "auto_augment"): {None},
    ("skip_corrupt", "data"): {"folder:images", "parquet:images"},
    ("exif_orientation", "data"): {"folder:images", "parquet:images"},
    ("decoder", "data"): {"folder:images", "parquet:images"},
    ("cache_images", "data"): {"folder:images", "parquet:images"},
    ("bn_statistics", "norm_batch_size"): {None, 32},
    ("bn_momentum", "norm_batch_size"): {None, 32, "global"},
    ("host_memory", "norm_batch_size"): {"global"},
    ("min_batch_size", "global_batch_size"): {"auto"},
    ("batch_decisions", "global_batch_size"): {"auto"},
    ("max_batch_size", "global_batch_size"): {"auto"},
    ("max_batch_size", "batch_schedule"): {"bsi", "lrd"},
    **{
        (name, "batch_schedule"): {"bsi", "lrd"}
        for name in ("factor", "past_max", "growth", "lr_growth", "batch_sizes", "lr_factors")
    },
    ("first_epoch", "batch_schedule"): {"bsi", "lrd"},
    ("gamma", "schedule"): {"step", "multistep"},
    ("milestones", "schedule"): {"step", "multistep"},
    ("milestones", "batch_schedule"): {"bsi", "lrd"},
    ("final_lr", "schedule"): {"cosine"},
    ("lr_exponent", "lr_scaling"): {"power"},
    ("base_batch_size", "lr_scaling"): {"auto", "linear", "sqrt", "power", "legw", "adascale"},
    ("warmup_epochs", "warmup"): {"gradual", "constant", "stairs"},
    ("warmup_start", "warmup"): {"gradual", "constant", "stairs"},
    ("momentum", "optimizer"): {"sgd", "lars", "rmsprop", "no such optimizer"},
    **{
        (f"wandb_{name}", "log_with"): {("run_folder", "wandb"), ("wandb",)}
        for name in ("project", "group", "name", "tags", "artifacts", "mode")
    },
}


def given(name):
    """A value that `name` can have."""
    row = OPTIONS[name]
    if row.choices:
        return row.choices[-1]
    for value in ("0.5", "2", "true", "per-512"):
        try:
            return row.parse(value)
        except ValueError:
            continue
    raise AssertionError(name)


def settings_with(name, other, value):
    settings = layered(Settings().with_values({other: value}), {name: given(name)}, origin="flag")
    assert settings.given == {name}
    return settings


def test_the_cases_are_the_table_s():
    assert set(READ_AT) == {
        (name, condition.other) for name, row in OPTIONS.items() for condition in row.reads_with
    }


@pytest.mark.parametrize(("name", "other"), READ_AT)
def test_an_option_is_refused_just_where_nothing_reads_it(name, other):
    refused = []
    for value in OTHERS[other]:
        settings = settings_with(name, other, value)
        if value in READ_AT[name, other]:
            check_read(settings)
            continue
        with pytest.raises(InputError) as caught:
            check_read(settings)
        text = str(caught.value)
        refused.append(value)
        assert OPTIONS[name].flag in text and "leave" in text
        assert len([c.use for c in OPTIONS[name].reads_with if c.use[3:] in text]) >= 1
    assert refused, "no value of the other setting leaves the option unread"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gamma 0.5", "--schedule cosine does not read --gamma 0.5"),
        ("--gamma 0.1", "--schedule cosine does not read --gamma 0.1"),  # the default, but typed
        ("--optimizer adamw --momentum 0.8", "--optimizer adamw does not read --momentum 0.8"),
        ("--crop-pct 0.9", "--data digits does not read --crop-pct 0.9"),
        ("--data cifar10 --val-fraction 0.1", "--data cifar10 does not read --val-fraction 0.1"),
        ("--lr-scaling none --base-batch-size 64", "--lr-scaling none does not read --base-batch"),
        (
            "--norm-batch-size frozen --bn-statistics per_update",
            "--norm-batch-size frozen does not read --bn-statistics per_update",
        ),
        (
            "--loss bce --class-weights balanced",
            "--loss bce does not read --class-weights balanced",
        ),
        ("--monitor val/loss", "does not read --monitor val/loss. Use --patience, such as 5"),
        ("--random-erasing 0.2", "--data digits does not read --random-erasing 0.2. Use images"),
        (
            "--data folder:x --auto-augment rand-m9 --color-jitter 0.2",
            "takes the place of timm's colour jitter, so nothing reads --color-jitter 0.2",
        ),
        (
            "--data folder:x --auto-augment rand-m9 --decoder fast",
            "--decoder fast with --auto-augment rand-m9: timm's policies work on Pillow's images",
        ),
        ("--decoder pillow", "--data digits does not read --decoder pillow. Its images are in mem"),
        ("--warmup none --warmup-start zero", "--warmup none does not read --warmup-start zero"),
        ("--log-with run_folder --wandb-name a", "--log-with run_folder does not read --wandb-nam"),
        ("--factor 5", "this recipe does not read --factor 5. Add --batch-schedule, such as bsi"),
        ("--min-batch-size 8", "--global-batch-size 512 does not read --min-batch-size 8"),
    ],
)
def test_the_command_line_refuses_them(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags.split()) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_yaml_that_names_a_default_asks_for_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("gamma: 0.1\nmodel: test_vit\n")
    assert train.main(["--config", "c.yaml", "--print-config"]) == 0
    (tmp_path / "c.yaml").write_text("gamma: 0.2\nmodel: test_vit\n")
    capsys.readouterr()
    assert train.main(["--config", "c.yaml"]) == 2
    assert "--schedule cosine does not read --gamma 0.2" in capsys.readouterr().err


def make_images(root):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (20 * i, 99, len(label))).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--data folder:images --val-fraction 0.3",
            "has a validation set of its own, so nothing reads --val-fraction 0.3",
        ),
        (
            "--data folder:images --crop-padding-mode grey",
            "whose random crops lie inside the image, so nothing reads --crop-padding-mode grey",
        ),
        (
            "--model test_vit --img-size 16 --bn-statistics per_update",
            "--bn-statistics per_update: test_vit has no BatchNorm. Leave it out.",
        ),
    ],
)
def test_what_the_images_or_the_network_leave_unread_is_refused_too(
    flags, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    assert train.main([*flags.split(), "--log-with", "run_folder", "--workers", "0"]) == 2
    assert says in capsys.readouterr().err


def test_a_crop_is_refused_for_images_that_a_parquet_file_gives_to_memory():
    settings = layered(Settings(), {"data": "parquet:x", "crop_pct": "0.9"}, origin="flag")
    check_read(settings)  # by the name of the data nobody can tell
    with pytest.raises(InputError, match="images are evaluated whole, so nothing reads --crop-pct"):
        check_read_from_data(settings, open_source("digits"))


@pytest.mark.parametrize(
    "flags", ["scale 0.5 1", "ratio 1 1", "color-jitter 0", "random-erasing 1"]
)
def test_what_timms_transform_reads_is_refused_for_images_that_are_in_memory(flags):
    name, *value = flags.split()
    given = {"data": "parquet:x", name.replace("-", "_"): " ".join(value)}
    settings = layered(Settings(), given, origin="flag")
    check_read(settings)  # by the name of the data nobody can tell
    with pytest.raises(InputError, match=f"nothing else is drawn, so nothing reads --{name} "):
        check_read_from_data(settings, open_source("digits"))
    if name != "color-jitter":
        policy = layered(settings, {"auto_augment": "rand-m9"}, origin="flag")
        check_read_from_data(policy, open_source("digits"))


@pytest.mark.parametrize("train_", ["head", "bias+head"])
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--norm-batch-size 8", "so nothing normalises by a batch"),
        ("--bn-statistics per_update", "nothing reads --bn-statistics per_update"),
        ("--bn-momentum 0.2", "nothing reads --bn-momentum 0.2"),
    ],
)
def test_a_frozen_batch_norm_reads_none_of_its_settings(
    train_, flag, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = f"--model lbaccel_tiny --train {train_} {flag} --log-with run_folder"
    assert train.main(flags.split()) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_resume_refuses_none_of_them_as_the_run_began_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    data = ["--data", "folder:images", "--img-size", 8, "--workers", 0, "--norm-batch-size", 4]
    folder = run("--max-updates", 1, "--micro-batch-size", 4, *data)
    unread = ["--gamma", "0.1", "--val-fraction", "0.2"]  # the run's own values
    assert run("--resume", folder, "--max-updates", 2, *data, *unread) == folder
