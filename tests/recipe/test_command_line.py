"""An error of the command line is one sentence: what was typed, its rule, what to type."""

from __future__ import annotations

import argparse

import pytest

from lbaccel.errors import InputError
from lbaccel.recipe import bounds
from lbaccel.recipe.command_line import CommandParser
from lbaccel.recipe.other_names import NAMES


@pytest.fixture
def parser():
    made = CommandParser(prog="lbaccel try")
    made.add_argument("run", metavar="RUN")
    made.add_argument("--model", required=True)
    made.add_argument("--epochs", type=bounds.epochs, default=1.0)
    made.add_argument("--sizes", type=bounds.count, nargs="+", metavar="B")
    made.add_argument("--offload", choices=("none", "optimizer"))
    made.add_argument("--json", action="store_true")
    return made


GOOD = ["here", "--model", "m"]
ALL = "lbaccel try --help lists all of its flags."
BAD = {
    "an unknown flag": (
        [*GOOD, "--epoch", "3"],
        f"unknown flag --epoch. Did you mean --epochs? {ALL}",
    ),
    "one with its value": (
        [*GOOD, "--epoch=3"],
        f"unknown flag --epoch. Did you mean --epochs? {ALL}",
    ),
    "nothing is near": ([*GOOD, "--zzz"], f"unknown flag --zzz. {ALL}"),
    "two lines in a flag": ([*GOOD, "--z\nz"], f"unknown flag '--z\\nz'. {ALL}"),
    "no abbreviations": ([*GOOD, "--js"], f"unknown flag --js. Did you mean --json? {ALL}"),
    "a word too much": (
        [*GOOD, "there"],
        "lbaccel try does not read 'there'. lbaccel try --help says what it reads.",
    ),
    "all that is required": (
        [],
        "lbaccel try needs RUN and --model MODEL. lbaccel try --help describes all arguments.",
    ),
    "a required flag with a slip": (
        ["here", "--modle", "m"],
        f"unknown flag --modle. Did you mean --model? {ALL}",
    ),
    "no value": ([*GOOD, "--epochs"], "--epochs has no value. Type --epochs EPOCHS."),
    "no value of many": ([*GOOD, "--sizes"], "--sizes has no value. Type --sizes B."),
    "no value of some": (
        [*GOOD, "--offload"],
        "--offload has no value. Type --offload {none,optimizer}.",
    ),
    "a flag in place of a value": (
        [*GOOD, "--epochs", "--json"],
        "--epochs has no value. Type --epochs EPOCHS.",
    ),
    "a value with a dash": (
        ["here", "--model", "-x"],
        "--model has no value. Type --model MODEL. A value that begins with a dash is typed as "
        "--model=-x.",
    ),
    "a wrong choice": (
        [*GOOD, "--offload", "optimiser"],
        "--offload='optimiser' is not one of none, optimizer. Did you mean optimizer?",
    ),
    "a value for a switch": (
        [*GOOD, "--json=yes"],
        "--json takes no value, and is given 'yes'. Type --json alone.",
    ),
    "text for a number": (
        [*GOOD, "--epochs", "many"],
        "--epochs='many' is not a number above 0 and at most 1,000,000.",
    ),
    "one of many": (
        [*GOOD, "--sizes", "8", "0"],
        "--sizes='0' is not a whole number from 1 to 2^53.",
    ),
    **{
        f"{value} is a value": (
            [*GOOD, "--epochs", value],
            f"--epochs='{value}' is not a number above 0 and at most 1,000,000.",
        )
        for value in ("-1", "-inf", "-Infinity", "-1e3", "-.5", "-nan", "-3GiB")
    },
}


@pytest.mark.parametrize("arguments, text", BAD.values(), ids=BAD)
def test_an_error_is_one_sentence(parser, arguments, text):
    with pytest.raises(InputError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == text


def test_a_long_value_is_cut(parser):
    with pytest.raises(InputError) as caught:
        parser.parse_args([*GOOD, "--epochs", "9" * 100_000])
    assert len(str(caught.value)) < 200


def test_what_is_right_is_read(parser):
    read = parser.parse_args([*GOOD, "--epochs", "2.5", "--sizes", "8", "16"])
    assert (read.run, read.model, read.epochs, read.sizes) == ("here", "m", 2.5, [8, 16])


def test_help_ends_without_an_error(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0 and "usage: lbaccel try" in capsys.readouterr().out


def test_the_words_behind_two_dashes_are_no_flags():
    parser = CommandParser(prog="lbaccel try")
    parser.add_argument("source", nargs="*")
    parser.add_argument("--model", required=True)
    with pytest.raises(InputError, match=r"^lbaccel try needs --model MODEL\."):
        parser.parse_args(["--", "train.py", "--modle", "m"])


@pytest.fixture
def family():
    parser = CommandParser(prog="lbaccel files")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|cp")
    actions.add_parser("ls")
    actions.add_parser("cp").add_argument("--force", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "lbaccel files needs one of ls, cp. Type one of them."),
        (["mv"], "lbaccel files: 'mv' is not one of ls, cp."),
        (["cpp"], "lbaccel files: 'cpp' is not one of ls, cp. Did you mean cp?"),
        (
            ["cp", "--forse"],
            "unknown flag --forse. Did you mean --force? lbaccel files cp --help lists all of its "
            "flags.",
        ),
        (
            ["ls", "there"],
            "lbaccel files ls does not read 'there'. lbaccel files ls --help says what it reads.",
        ),
    ],
)
def test_a_subcommand_speaks_for_itself(family, arguments, text):
    with pytest.raises(InputError) as caught:
        family.parse_args(arguments)
    assert str(caught.value) == text


def test_the_nearest_flag_may_be_one_that_another_parser_reads():
    parser = CommandParser(
        prog="lbaccel lr-find",
        beside=["--num-updates", "--base-lr", "--lr-scaling", "--base-batch-size"],
        lists="Two lists have them.",
    )
    for typed, text in (
        ("--num-update", "Did you mean --num-updates? Two lists have them."),
        ("--lr", f"{NAMES['lr'].said('3')} Two lists have them."),
    ):
        with pytest.raises(InputError) as caught:
            parser.parse_args([typed, "3"])
        assert str(caught.value) == f"unknown flag {typed}. {text}"


def test_a_message_that_no_rule_knows_is_a_sentence_too(parser):
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--one", action="store_true")
    group.add_argument("--two", action="store_true")
    with pytest.raises(InputError) as caught:
        parser.parse_args([*GOOD, "--one", "--two"])
    (line,) = str(caught.value).splitlines()
    assert "--one" in line and "--two" in line and not isinstance(caught.value, SystemExit)


def test_argparse_too_gets_the_rule_of_a_number():
    """`Unfit` is the error that argparse asks a type for."""
    plain = argparse.ArgumentParser(exit_on_error=False)
    plain.add_argument("--epochs", type=bounds.epochs)
    with pytest.raises(argparse.ArgumentError, match="'0' is not a number above 0"):
        plain.parse_args(["--epochs", "0"])


def test_underscores_and_no_are_read_as_other_tools_have_them():
    parser = CommandParser(prog="lbaccel x")
    parser.add_argument("--img-size")
    parser.add_argument("--a_b")
    parser.add_argument("--pretrained", nargs="?", const=True)
    parser.add_argument("--no-cache", action="store_true")
    typed = ["--img_size", "96", "--a_b", "1", "--no-pretrained", "--no-cache"]
    found = parser.parse_args(typed)
    assert vars(found) == {"img_size": "96", "a_b": "1", "pretrained": "false", "no_cache": True}
    assert parser.parse_args(["--img_size=3"]).img_size == "3"
    for wrong in ("--no-img-size", "--no_such", "--no-pretrained=1"):
        with pytest.raises(InputError, match=f"unknown flag {wrong.split('=')[0]}"):
            parser.parse_args([wrong])


@pytest.mark.parametrize("flag", ["--wandb-tags", "--wandb_tags"])
@pytest.mark.parametrize("word", ["seed=1", "bf16", "true"])
def test_a_value_that_looks_like_a_setting_is_a_value(flag, word):
    from lbaccel.recipe.settings import read_settings

    for words in (["trial", word], [word, "true"], [word]):
        settings, _ = read_settings([flag, *words, "--epochs", "3"])
        assert settings.run.wandb_tags == tuple(words)
        assert settings.run.seed == 0 and settings.rate.epochs == 3


def test_the_recipe_takes_them_too():
    from lbaccel.recipe.settings import read_settings

    typed = ["--global_batch_size", "64", "--no-exif-orientation", "--base_lr=0.2"]
    settings, _ = read_settings([*typed, "--data", "folder:x"])
    assert settings.batch.global_batch_size == 64 and settings.rate.base_lr == 0.2
    assert settings.data.exif_orientation is False
