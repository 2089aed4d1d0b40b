"""Settings: what YAML and flags become, where each came from, and what is refused how."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lbaccel import cli
from lbaccel.errors import InputError
from lbaccel.recipe.checks import checked
from lbaccel.recipe.options import GROUPS, OPTIONS, TITLES
from lbaccel.recipe.settings import make_parser, read_settings, show_settings

PACKAGE = Path(__file__).parents[2] / "lbaccel"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(flags="", text=None):
    argv = shlex.split(flags)
    if text is not None:
        Path("c.yaml").write_text(text)
        argv = ["--config", "c.yaml", *argv]
    settings, show = read_settings(argv)
    return settings.values(), {name: settings.origin(name) for name in OPTIONS}, show


def test_a_length_that_is_typed_takes_the_place_of_the_other_kind_of_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    for text, typed, left, note in (
        (
            *("epochs: 30", ["--max-minutes", "3"], {"max_minutes"}),
            "max_minutes (flag) takes the place of epochs 30 (",
        ),
        (
            *("max_minutes: 3", ["--epochs", "4"], {"epochs"}),
            "epochs (flag) takes the place of max_minutes 3 (",
        ),
        ("epochs: 30", ["--epochs", "4"], {"epochs"}, None),
    ):
        path.write_text(text)
        settings, _ = read_settings(["--config", str(path), *typed])
        assert settings.given == left
        assert [n[: len(note)] for n in settings.notes] == [note] if note else not settings.notes
        checked(settings)


def test_without_flags_every_option_has_its_default():
    values, origins, show = read()
    assert values == {name: option.default for name, option in OPTIONS.items()}
    assert set(origins.values()) == {"default"} and show is False


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_dead(name):
    """Each is read somewhere past the table that declares it."""
    readers = [PACKAGE / "train.py", *(PACKAGE / "recipe").glob("*.py")]
    text = "\n".join(p.read_text() for p in readers if not p.stem.startswith("options"))
    group = OPTIONS[name].group
    assert re.search(rf"\b({group}|batch|data|options)\.{name}\b", text) or f'"{name}"' in text


@pytest.mark.parametrize("name", OPTIONS)
def test_the_help_says_flag_and_default_of_each_option_in_its_group(name):
    text = make_parser().format_help()
    assert f"--{name.replace('_', '-')} " in text
    (group,) = [t for t, options in GROUPS.items() if OPTIONS[name] in options]
    title = TITLES.get(group, group)
    assert f"\n{title}:\n" in text
    option = OPTIONS[name]
    shown = option.shown or option.default
    shown = " ".join(shown) if isinstance(shown, tuple) else shown
    assert f"(default: {shown})" in " ".join(text.split())


def test_the_flags_of_the_issue_are_all_there():
    asked = """
    --model --pretrained --checkpoint --num-classes --drop-rate --drop-path --data --val-fraction
    --workers --img-size --stem --mean --std --interpolation --crop-pct --epochs --max-updates
    --global-batch-size --micro-batch-size --norm-batch-size --bn-statistics --last-update --base-lr
    --base-batch-size --lr-scaling --warmup --warmup-epochs --warmup-start --schedule --milestones
    --gamma --optimizer --momentum --weight-decay --layer-decay --label-smoothing --mixup --cutmix
    --auto-augment --activation-checkpointing --memory-format --precision --clip-grad-norm
    --ema-decay --seed --output --log-every --eval-every --checkpoint-every --keep --dry-run
    --log-with --wandb-project --wandb-group --wandb-name --wandb-tags --wandb-mode --decay-all
    --bn-momentum --final-lr
    """
    assert {flag[2:].replace("-", "_") for flag in asked.split()} <= set(OPTIONS)


@pytest.mark.parametrize(
    ("flags", "text", "name", "value"),
    [
        ("--mean 0.5 0.25 0", "mean: [0.5, 0.25, 0]", "mean", (0.5, 0.25, 0.0)),
        ("--mean 0.5,0.25,0", "mean: 0.5,0.25,0", "mean", (0.5, 0.25, 0.0)),
        ("--std 0.5", "std: 0.5", "std", (0.5,)),
        ("--milestones 3 6", "milestones: [3, 6]", "milestones", (3.0, 6.0)),
        ("--pretrained", "pretrained: true", "pretrained", True),
        ("--pretrained no", "pretrained: off", "pretrained", False),
        ("--norm-batch-size frozen", "norm_batch_size: frozen", "norm_batch_size", "frozen"),
        ("--norm-batch-size 16", "norm-batch-size: 16", "norm_batch_size", 16),
        ("--base-lr 1e-3", "base_lr: 1e-3", "base_lr", 0.001),  # YAML 1.1 reads 1e-3 as text
        ("--warmup-start zero", "warmup_start: zero", "warmup_start", "zero"),
        ("--warmup-start 0.01", "warmup_start: 0.01", "warmup_start", 0.01),
        ("--layer-decay none", "layer_decay: null", "layer_decay", None),
        ("--activation-checkpointing none", None, "activation_checkpointing", "none"),
        ("--warmup none", "warmup: none", "warmup", "none"),
        ("--wandb-tags a b", "wandb_tags: [a, b]", "wandb_tags", ("a", "b")),
        ("--log-with run_folder", "log_with: run_folder", "log_with", ("run_folder",)),
        ("--seed 7.0", "seed: 7.0", "seed", 7),
    ],
)
def test_flag_and_yaml_key_mean_the_same(flags, text, name, value):
    if name == "seed":  # a flag is text, and '7.0' is no whole number there
        with pytest.raises(InputError, match="not a whole number"):
            read(flags)
    else:
        values, origins, _ = read(flags)
        assert values[name] == value and type(values[name]) is type(value)
        assert origins[name] == "flag"
    if text is not None:
        values, origins, _ = read("", text)
        assert values[name] == value and type(values[name]) is type(value)
        assert origins[name] == "c.yaml"


def test_flags_win_and_the_rest_of_the_yaml_stays():
    values, origins, _ = read("--epochs 3", "epochs: 7\nmomentum: 0.5\n")
    assert (values["epochs"], origins["epochs"]) == (3.0, "flag")
    assert (values["momentum"], origins["momentum"]) == (0.5, "c.yaml")
    assert (values["gamma"], origins["gamma"]) == (0.1, "default")


def test_what_a_run_folder_adds_to_its_config_is_passed_over():
    values, origins, _ = read("", "epochs: 2\nplan: {lr: 3}\norigin: {epochs: flag}\n")
    assert values["epochs"] == 2.0 and origins["epochs"] == "c.yaml"


@pytest.mark.parametrize("origin", ["5", "word", "[a]", ""])
def test_an_origin_that_a_hand_wrote_is_passed_over(origin):
    values, origins, _ = read("", f"epochs: 2\norigin: {origin}\n")
    assert values["epochs"] == 2.0 and origins["epochs"] == "c.yaml"


def test_every_setting_survives_a_round_trip_through_yaml():
    flags = (
        "--mean 0.1 0.2 0.3 --std 1 --milestones 1.5 2 --wandb-tags a b --base-lr 1e-7 "
        "--norm-batch-size frozen --pretrained --checkpoint x.pth --auto-augment rand-m9 "
        "--precision fp64 --layer-decay 0.7 --warmup-start zero --log-with run_folder"
    )
    values, _, _ = read(flags)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    again, origins, _ = read("", yaml.safe_dump(plain))
    assert again == values and set(origins.values()) == {"c.yaml"}


def test_print_config_shows_value_and_origin_in_columns():
    _, origins, show = read("--epochs 3 --print-config", "momentum: 0.5\n")
    assert show
    settings, _ = read_settings(["--config", "c.yaml", "--epochs", "3"])
    lines = show_settings(settings).splitlines()
    assert len(lines) == len(OPTIONS)
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["epochs"] == ["3.0", "flag"] and rows["momentum"] == ["0.5", "c.yaml"]
    assert rows["gamma"] == ["0.1", "default"]
    assert len({line.rindex(" " + origins[line.split()[0]]) for line in lines}) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gobal-batch-size 8", ["unknown flag --gobal-batch-size", "--global-batch-size?"]),
        ("--gobal-batch-size=8", ["unknown flag --gobal-batch-size.", "--global-batch-size?"]),
        ("--glob 8", ["unknown flag --glob"]),  # no abbreviations: a new flag must not break one
        ("word", ["lbaccel train does not read 'word'. lbaccel train --help"]),
        ("--epochs", ["--epochs has no value. Type --epochs X."]),
        ("--epochs many", ["--epochs='many' is not a number"]),
        ("--global-batch-size 2.5", ["--global-batch-size='2.5' is not a whole number"]),
        (
            "--norm-batch-size some",
            ["--norm-batch-size='some'", "a whole number from 1 to 2^53, 'global' or 'frozen'"],
        ),
        ("--pretrained maybe", ["--pretrained='maybe' is not true or false"]),
        ("--schedule cosin", ["--schedule='cosin' is not one of", "Did you mean cosine?"]),
        ("--warmup-start low", ["--warmup-start='low'", "'zero' or a learning rate"]),
        ("--mean a b", ["--mean=", "is not numbers"]),
        ("--config nowhere.yaml", ["nowhere.yaml can't be read", "No such file"]),
        ("--config .", ["can't be read", "directory"]),
    ],
)
def test_a_flag_of_no_use_is_refused_by_name(flags, words):
    with pytest.raises(InputError) as caught:
        read(flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("global_batch_sise: 8", ["'global_batch_sise'", "Did you mean global_batch_size?"]),
        ("xyzzy: 8", ["unknown key 'xyzzy'. lbaccel train --help"]),
        ("5: 8", ["unknown key 5"]),
        ("epochs: [1, 2]", ["epochs in c.yaml=[1, 2] is not a number"]),
        ("epochs: {a: 1}", ["epochs in c.yaml", "is not a number"]),
        ("epochs: yes", ["epochs in c.yaml=True is not a number"]),
        ("seed: true", ["seed in c.yaml=True is not a whole number"]),
        ("model: on", ["model in c.yaml=True"]),
        ("global_batch_size: 2.5", ["2.5 is not a whole number"]),
        ("global_batch_size:", ["is empty", "default, 512"]),
        ("pretrained: maybe", ["'maybe' is not true or false"]),
        ("mean: {r: 1}", ["is not numbers"]),
        ("wandb_tags: 5", ["wandb_tags in c.yaml=5 is not words"]),
        ("- a\n- b", ["holds no mapping", "epochs: 10"]),
        ("just text", ["holds no mapping"]),
        ("a: [", ["is no YAML", "line 1"]),
        ("!!python/object/apply:os.getcwd []", ["is no YAML"]),
    ],
)
def test_a_yaml_of_no_use_is_refused_by_name(text, words):
    with pytest.raises(InputError) as caught:
        read("", text)
    for word in ["c.yaml", *words]:
        assert word in str(caught.value)


def test_an_empty_yaml_changes_nothing():
    assert read("", "")[0] == read()[0]


# -- several files --------------------------------------------------------------------------------


def test_of_several_files_the_later_one_wins_and_origins_name_it():
    Path("a.yaml").write_text("epochs: 7\nmomentum: 0.5\nseed: 1\n")
    Path("b.yaml").write_text("momentum: 0.6\nseed: 2\n")
    for flags in ("--config a.yaml b.yaml", "--config a.yaml --config b.yaml"):
        values, origins, _ = read(f"{flags} --seed 3")
        assert (values["epochs"], origins["epochs"]) == (7.0, "a.yaml")
        assert (values["momentum"], origins["momentum"]) == (0.6, "b.yaml")
        assert (values["seed"], origins["seed"]) == (3, "flag")
    values, origins, _ = read("--config b.yaml a.yaml")
    assert (values["momentum"], origins["momentum"]) == (0.5, "a.yaml")


def test_a_later_file_takes_back_what_one_before_asked_for():
    Path("a.yaml").write_text("gamma: 0.5\nschedule: step\nmilestones: [2]\n")
    Path("b.yaml").write_text("gamma: 0.1\nschedule: cosine\nmilestones: []\n")
    settings, _ = read_settings(["--config", "a.yaml", "b.yaml"])
    assert settings.given == frozenset()  # gamma 0.1 is the default: a cosine need not refuse it
    settings, _ = read_settings(["--config", "b.yaml", "a.yaml"])
    assert settings.given == {"gamma", "schedule", "milestones"}


def test_a_file_of_no_use_among_several_is_named():
    Path("a.yaml").write_text("epochs: 7\n")
    Path("b.yaml").write_text("epoch: 7\n")
    with pytest.raises(InputError, match=r"--config b\.yaml: unknown key 'epoch'"):
        read_settings(["--config", "a.yaml", "b.yaml"])
    with pytest.raises(InputError, match=r"--config has no value\. Type --config FILE\."):
        read_settings(["--config"])


def test_a_run_of_before_among_several_files_keeps_its_own_value_of_what_it_does_not_name():
    Path("run.yaml").write_text("data: folder:x\nplan: {}\n")
    Path("b.yaml").write_text("seed: 2\n")
    for order in ("run.yaml b.yaml", "b.yaml run.yaml"):
        values, origins, _ = read(f"--config {order}")
        assert values["test_split"] == "val" and origins["test_split"] == "run.yaml"
        assert values["seed"] == 2
    Path("b.yaml").write_text("test_split: test\n")
    assert read("--config run.yaml b.yaml")[0]["test_split"] == "test"


# -- the two helps --------------------------------------------------------------------------------


def test_the_settings_that_most_people_need_are_fifteen():
    assert len([row for row in OPTIONS.values() if row.common]) == 15
    asked = {"model", "pretrained", "data", "epochs", "global_batch_size", "base_lr", "optimizer"}
    assert all(OPTIONS[name].common for name in asked | {"memory", "precision", "resume", "output"})


@pytest.mark.parametrize("command", ["train", "start"])
def test_the_short_help_has_those_and_names_the_long_one(command, capsys):
    shown = {}
    for ask in (["--help"], ["-h"], ["--help", "all"], ["-h", "all"], ["--help-all"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, *ask])
        assert stop.value.code == 0
        shown[" ".join(ask)] = capsys.readouterr().out
    short, whole = shown["--help"], shown["--help all"]
    assert shown["-h"] == short and shown["-h all"] == shown["--help-all"] == whole
    left_out = [row for row in OPTIONS.values() if not row.common]
    for row in OPTIONS.values():
        if command == "start" and row.name == "data":
            continue
        described = re.compile(rf"^  {row.flag} ", re.M)
        assert described.search(whole)
        assert bool(described.search(short)) is row.common, row.name
    assert f"lbaccel {command} --help all lists {len(left_out)} more settings, by group." in short
    assert "--help all" not in whole and len(short.splitlines()) < 90
    for title in ("model:", "batch:", "learning rate:", "run:"):
        assert f"\n{title}\n" in short and f"\n{title}\n" in whole
    assert "\nusage: " in f"\n{short}" and "--gamma" not in short.split("options:")[0]


def test_the_help_is_whole_again_after_the_short_one(capsys):
    parser = make_parser()
    whole = parser.format_help()
    parser.print_help()
    assert capsys.readouterr().out != whole and parser.format_help() == whole
