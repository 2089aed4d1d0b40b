"""The `lbaccel` command: one subcommand a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, brief, check_choice
from lbaccel.recipe.command_line import CommandParser
from lbaccel.recipe.ending import ending
from lbaccel.recipe.values import nearest_name
from lbaccel.runs.columns import columns

# subcommand: its module, imported when it is called, and its line in the help. `train` has a
# `main(argv)`, since launchers start it by itself; all others have `add_arguments` and `run`.
COMMANDS = {
    "train": ("train", "train or finetune a timm backbone at a global batch that does not fit"),
    "start": (
        "commands.start",
        "from a folder of photographs to a recipe, with a first figure on the way",
    ),
    "schedule": (
        "commands.schedule",
        "a batch-size schedule: batch, learning rate and updates from each epoch on",
    ),
    "lr-find": (
        "commands.lr_find",
        "which learning rates a recipe bears at its global batch; changes nothing",
    ),
    "plan": (
        "commands.plan",
        "does a batch fit, what is the fastest way to fit it, what would each lever buy",
    ),
    "configs": (
        "commands.configs",
        "the launcher's files: list, copy, explain, or make them for a plan",
    ),
    "doctor": (
        "commands.doctor",
        "what is known to go wrong with this environment, config and script",
    ),
    "env": (
        "commands.env",
        "this machine and its versions, to paste into a bug report",
    ),
    "report": (
        "commands.report",
        "runs and studies as one page: the verdict, curves, tables, where each number is from",
    ),
    "compare": (
        "commands.compare",
        "finished runs side by side: what differed, and what came of it",
    ),
    "study": (
        "commands.study",
        "arms x batch sizes x seeds as one: planned, run, gone on with, reported",
    ),
    "scaling": (
        "commands.scaling",
        "how far can the batch of one's own recipe grow: tuned rates, seeds, one page",
    ),
    "eval": (
        "commands.eval",
        "a trained model judged on images with labels: figures, intervals, pictures",
    ),
    "predict": (
        "commands.predict",
        "a trained model used on images without labels: classes and probabilities as CSV",
    ),
    "landscape": (
        "commands.landscape",
        "loss and accuracy around trained weights, or between two models: curve and surface",
    ),
    "sharpness": (
        "commands.sharpness",
        "how sharp a minimum is: Hessian eigenvalues, and two measures of the loss around it",
    ),
    "export": (
        "commands.export",
        "a run as a folder that timm and the Hugging Face hub load, with a model card",
    ),
    "verify": (
        "commands.verify",
        "a gradient check: is an update of this model the same however it is cut?",
    ),
    "transfer": (
        "commands.transfer",
        "a recipe's hyper-parameters moved to another global batch, each by its rule",
    ),
    "replicate": (
        "commands.replicate",
        "a recipe made for many GPUs, as the contract of one card",
    ),
    "advise": (
        "commands.advise",
        "how large should the batch be, by the noise of a run's gradients",
    ),
    "calibrate": (
        "commands.calibrate",
        "what this machine's device reaches in each class of kernel, for plans",
    ),
}
MORE = (
    "lbaccel COMMAND --help says more.",
    "lbaccel --print-completion SHELL prints completions for bash, zsh or tcsh.",
)
SHELLS = ("bash", "zsh", "tcsh")


def usage() -> str:
    """The help of `lbaccel` itself."""
    table = columns([(f"  {name}", line) for name, (_, line) in COMMANDS.items()])
    return "\n".join(["usage: lbaccel COMMAND ...", "", *table, "", *MORE, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (0 done, 1 failed, 2 input, 130 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command == "train":
        from lbaccel import train

        return train.main(arguments)
    if command in COMMANDS:
        return ending(lambda: _run(command, arguments))
    if command in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if command == "--version":
        from lbaccel import __version__

        print(f"lbaccel {__version__}")
        return 0
    if command.partition("=")[0] == "--print-completion":
        return ending(lambda: _print_completion([*command.split("=")[1:], *arguments]))
    near = nearest_name(command, COMMANDS)
    print(f"error: no command {brief(command)}.{near} lbaccel --help lists them.", file=sys.stderr)
    return 2


def parser_of(name: str) -> CommandParser:
    """The parser of a command other than `train`, whose own is `recipe.settings.make_parser`."""
    parser = CommandParser(prog=f"lbaccel {name}")
    _module(name).add_arguments(parser)
    return parser


def completion(shell: str) -> str:
    """The script that completes `lbaccel` in a shell: all commands, their flags and choices.

    Raises:
        InputError: another shell, or shtab is not installed.
    """
    check_choice("--print-completion", shell, choices=SHELLS)
    from lbaccel.recipe.settings import add_options, add_recipe

    try:
        import shtab
    except ImportError as error:
        raise InputError(
            "completions are made by shtab, which is not installed: pip install shtab"
        ) from error
    whole = CommandParser(prog="lbaccel")
    commands = whole.add_subparsers(metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        parser = commands.add_parser(name, help=line)
        if name == "train":
            add_recipe(parser)
        else:
            _module(name).add_arguments(parser)
        if parser.get_default("recipe_flags") is not None:
            taken = {action.dest for action in parser._actions}
            add_options(parser, without=taken)
        for action in parser._actions:
            if action.type is Path or action.metavar == "FILE":
                setattr(action, "complete", shtab.FILE)  # noqa: B010 - not an attribute of argparse
    return shtab.complete(whole, shell=shell)


def _print_completion(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise InputError(f"--print-completion takes one of {', '.join(SHELLS)}.")
    print(completion(arguments[0]))
    return 0


def _module(name: str) -> Any:
    return import_module(f"lbaccel.{COMMANDS[name][0]}")


def _run(name: str, arguments: Sequence[str]) -> int:
    """A command of two functions: `add_arguments(parser)` and `run(namespace) -> exit code`.

    A command whose `add_arguments` sets a default for `recipe_flags` is given all the flags there
    that it does not declare itself.
    """
    parser = parser_of(name)
    known, rest = parser.parse_known_args(arguments)
    if hasattr(known, "recipe_flags"):
        known.recipe_flags = rest
    elif rest:
        parser.refuse(rest, known)
    return _module(name).run(known)
