"""Every flag of every command, tried with what no flag means: a value within its rule, or one line.

The flags are those of the parsers themselves, so that a new one is tried too.
"""

from __future__ import annotations

import argparse
import math

import pytest

from lbaccel import cli
from lbaccel.errors import InputError
from lbaccel.recipe.bounds import Bounded, BoundedList
from lbaccel.recipe.checks import checked
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import layered, make_parser, parse
from lbaccel.recipe.values import numbers

EXTREMES = ("-1", "0", "nan", "inf", "-inf", "1e30", "text", "", "-1e3", "9" * 5000, "1" + 30 * "0")
OTHERS = [name for name in cli.COMMANDS if name != "train"]


def with_their_parsers(parser):
    """Pairs of an action and the parser that reads it, through all subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from with_their_parsers(inner)
        else:
            yield parser, action


def actions_of(name):
    return list(with_their_parsers(cli.parser_of(name)))


FLAGS = [
    pytest.param(parser, action, id=f"{parser.prog} {action.option_strings[-1]}")
    for name in OTHERS
    for parser, action in actions_of(name)
    if isinstance(action.type, Bounded)
]


def needed(parser, action):
    """Arguments without which the parser stops earlier."""
    words = []
    for other in parser._actions:
        if not other.required or other is action:
            continue
        value = "1" if isinstance(other.type, Bounded) else next(iter(other.choices or ["x"]))
        words += [*other.option_strings[-1:], value]
    return words


@pytest.mark.parametrize("name", OTHERS)
def test_no_flag_reads_a_number_without_bounds(name):
    for _, action in actions_of(name):
        assert action.type not in (int, float, complex), action.option_strings
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            assert isinstance(action.type, Bounded), action.option_strings


@pytest.mark.parametrize("parser, action", FLAGS)
@pytest.mark.parametrize("value", EXTREMES, ids=lambda text: text[:8] or "nothing")
def test_a_number_is_within_its_rule_or_refused_in_a_sentence(parser, action, value):
    flag = action.option_strings[-1]
    arguments = [*needed(parser, action), flag, value]
    try:
        found = getattr(parser.parse_args(arguments), action.dest)
    except InputError as error:
        (line,) = str(error).splitlines()
        assert line.startswith(f"{flag}=") and line.endswith(f" is not {action.type.rule}.")
        assert len(line) < 300
        return
    (found,) = found if isinstance(found, list) else [found]
    assert math.isfinite(found) and action.type.holds(found)


@pytest.mark.parametrize("parser, action", FLAGS)
def test_a_number_that_is_nothing_at_all_is_always_refused(parser, action):
    for value in ("nan", "inf", "-inf", "text", "", "9" * 5000):
        with pytest.raises(InputError):
            parser.parse_args([*needed(parser, action), action.option_strings[-1], value])


@pytest.mark.parametrize("parser, action", FLAGS)
@pytest.mark.parametrize("value", EXTREMES, ids=lambda text: text[:8] or "nothing")
def test_a_flag_of_the_recipes_name_takes_no_more_than_the_recipe(parser, action, value):
    row = OPTIONS.get(action.dest)
    # verify's seed is no setting of a run, and reaches no library but torch
    if row is None or action.dest == "seed":
        return
    try:
        action.type(value)
    except ValueError:
        return
    raw = [value] if isinstance(row.parse, BoundedList) else value
    parse(row, raw, "flag")  # raises nothing


WITHOUT_BOUNDS = {"mean", "std"}  # `recipe.checks` says what they are
NUMERIC = [
    name
    for name, row in OPTIONS.items()
    if isinstance(row.parse, (Bounded, BoundedList)) or row.parse is numbers
]
WITH = {
    "milestones": {"schedule": "multistep"},
    "gamma": {"schedule": "multistep", "milestones": "3"},
    "lr_exponent": {"lr_scaling": "power"},
    "crop_pct": {"data": "folder:x"},
    "min_batch_size": {"global_batch_size": "auto", "max_batch_size": "512"},
    **{name: {"batch_schedule": "bsi"} for name in ("factor", "max_batch_size")},
    **{name: {"batch_schedule": "fast"} for name in ("growth", "lr_growth", "first_epoch")},
    **{name: {"batch_schedule": "listed"} for name in ("batch_sizes", "lr_factors")},
}


def test_every_number_of_the_recipe_has_bounds():
    for name, row in OPTIONS.items():
        assert row.parse not in (int, float), name
        assert row.parse is not numbers or name in WITHOUT_BOUNDS, name


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("value", EXTREMES, ids=lambda text: text[:8] or "nothing")
def test_a_number_of_the_recipe_is_within_its_rule_or_refused(name, value):
    row = OPTIONS[name]
    typed = vars(make_parser().parse_args([row.flag, value]))
    try:
        settings = checked(layered(Settings(), {**WITH.get(name, {}), **typed}, origin="flag"))
    except InputError as error:
        (line,) = str(error).splitlines()
        assert row.flag in line and len(line) < 500
        return
    found = settings.value(name)
    for number in found if isinstance(found, tuple) else [found]:
        assert math.isfinite(number)
        rule = getattr(row.parse, "each", row.parse)
        assert name in WITHOUT_BOUNDS or rule.holds(number)
    assert found != ()


PLAN = ["plan", "--model", "resnet10t", "--global-batch-size", "8"]
MOVED = ["transfer", "--base-batch-size", "256", "--global-batch-size", "8192"]
MANY = ["replicate", "--gpus", "8", "--per-gpu-batch", "32", "--lr", "0.1", "--epochs", "90"]
SIZES = ["schedule", "--batch-schedule", "bsi", "--global-batch-size", "8", "--num-samples", "900"]
SIZES += ["--base-lr", "0.1"]
CHECK = ["verify", "--model", "resnet10t"]
REFUSED = [
    ([*MOVED, "--optimizer", "foo"], "optimizer='foo' is none of timm.optim"),
    ([*MOVED, "--optimizer", "adamv"], "Nearest: adam,"),
    ([*MOVED, "--lr-scaling", "linaer"], "Did you mean linear?"),
    ([*PLAN, "--epochs", "-1"], "--epochs='-1' is not a number above 0"),
    ([*PLAN, "--memory", "-3GiB"], "memory='-3GiB' is no size"),
    ([*PLAN, "--memory", "nanGiB"], "memory='nanGiB' is no size"),
    ([*PLAN, "--memory", "9" * 400 + "GiB"], "is no size"),
    ([*PLAN, "--device", "no such card"], "device='no such card' is not known"),
    ([*PLAN, "--precision", "fp31"], "Did you mean fp32?"),
    ([*PLAN, "--memory", "1GiB", "--device", "cpu", "--optimizer", "adamv"], "Nearest: adam,"),
    (["plan", "--model", "resnet19", "--global-batch-size", "8"], "Nearest: resnet18"),
    (["plan", "--model", "resnet10t", "--global-batch-size", str(10**12)], "above 100,000,000"),
    (["configs", "make", *PLAN[1:], "--zero", "4"], "--zero='4' is not 0, 1, 2 or 3"),
    (["configs", "maek"], "Did you mean make?"),
    (["doctor", "--model", "resnet19"], "Nearest: resnet18"),
    ([*MANY, "--optimizer", "foo", "--no-plan"], "optimizer='foo' is none of timm.optim"),
    ([*MANY, "--out", "recipe.yaml", "--memory", "nanGiB"], "memory='nanGiB' is no size"),
    ([*MANY, "--out", "recipe.yaml", "--device", "no such card"], "is not known"),
    ([*MANY, "--sync-bn", "maybe"], "--sync-bn='maybe' is neither yes nor no"),
    ([*SIZES, "--epochs", "1e30"], "--epochs='1e30' is not a number above 0 and at most 1,000,000"),
    ([*SIZES, "--samples", str(2**53)], "1,000,000 epochs"),
    (
        [*SIZES, "--epochs", "9", "--schedule", "cosin"],
        "--schedule='cosin' is not one of constant, cosine. Did you",
    ),
    (
        [*SIZES, "--epochs", "9", "--warmup", "gradul"],
        "--warmup='gradul' is not one of none, gradual",
    ),
    ([*CHECK, "--norm-batch-size", str(2**53)], "GiB are free here"),
    ([*CHECK, "--against", "ddp", "--gpus", "1000000"], "1,000,000 ranks"),
    ([*CHECK, "--against", "ddp", "--accumulation", str(10**12)], "GiB are free here"),
    ([*CHECK, "--img-size", "65535"], "GiB are free here"),
    ([*CHECK, "--num-classes", str(10**7)], "GiB are free here"),
    (["calibrate", "--device", "gpu"], "--device='gpu' is not one of cpu, cuda"),
    (["calibrate", "--seconds", "0"], "--seconds='0' is not a finite number above 0"),
    (["lr-find", "--num-update", "9"], "Did you mean --num-updates?"),
    (["lr-find", "--modle", "x"], "lbaccel lr-find --help and lbaccel train --help all list"),
    (["lr-find", "--epochs", "-inf"], "--epochs='-inf' is not a number above 0"),
    (["lr-find", "--num-updates", "4"], "--num-updates='4' is not a whole number from 5"),
    (["train", "-b", "8"], "8 on 4 GPUs without accumulation is --global-batch-size 32."),
    (["train", "--workers", "100000"], "--workers='100000' is not a whole number from 0 to 1,024"),
    (["train", "--mean", ""], "--mean is empty"),
    (["shedule"], "no command 'shedule'. Did you mean schedule? lbaccel --help lists them."),
]


@pytest.mark.parametrize("arguments, text", REFUSED, ids=lambda value: str(value)[-40:])
def test_a_command_says_in_one_line_why_it_does_not_start(
    arguments, text, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and text in line and not out
    assert not list(tmp_path.iterdir())


LARGE = [
    [*SIZES, "--epochs", "999999", "--milestones", "60", "120"],
    ["schedule", *SIZES[1:-3], str(2**53), "--epochs", "999999", "--base-lr", "1e-300"],
    [*MOVED, "--epochs", "1000000", "--num-samples", str(2**53), "--eval-every", "1e300"],
    [*MOVED[:-1], str(2**53), "--weight-decay", "1e300", "--clip-grad-norm", "1e-300"],
    [*MANY, "--no-plan", "--model", "resnet10t", "--num-samples", str(2**53)],
]


@pytest.mark.parametrize("arguments", LARGE, ids=lambda value: " ".join(value)[-40:])
def test_a_large_value_that_means_something_ends_in_an_answer(arguments, capsys):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out and not err and "nan" not in out.split() and "inf" not in out.split()
