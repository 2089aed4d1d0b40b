"""`lbaccel start`: from a folder of photographs to a recipe, with a first figure on the way."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lbaccel.errors import InputError
from lbaccel.recipe import bounds
from lbaccel.recipe.settings import (
    add_options,
    from_configs,
    layered,
    show_settings,
    typed_options,
    under_a_batch_schedule,
)
from lbaccel.recipe.values import spec_of
from lbaccel.runs.folder import CONFIG, atomic_write_text
from lbaccel.runs.outputs import Own, writable
from lbaccel.text import printable

if TYPE_CHECKING:  # torch is imported after the flags were read
    from lbaccel.product.start import Start

PROG = "lbaccel start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command itself; all others are the recipe's, and pin a choice."""
    parser.usage = f"{PROG} DATA [--minutes M] [--run] [flags of lbaccel train]"
    parser.description = (
        "Look at a folder of photographs, choose a recipe that fits the time and the memory, write "
        "it to a file with a reason a line, and print the line of lbaccel train that it is. Any "
        "flag of lbaccel train pins that choice (--model, --checkpoint, --img-size, --memory ...)."
    )
    parser.add_argument("data", metavar="DATA", help="a folder with a sub-folder a class")
    parser.add_argument(
        "--minutes",
        type=bounds.minutes,
        default=30.0,
        metavar="M",
        help="in all (default: %(default)g)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(CONFIG), metavar="F", help="(default: %(default)s)"
    )
    parser.add_argument("--run", action="store_true", help="train at once")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a YAML file of settings, or a recipe by its name: what it names is pinned; may be "
        "given again, later ones win, and flags",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print what is pinned, and stop"
    )
    add_options(parser, without=["data"])


def run(own: argparse.Namespace) -> int:
    """Write the recipe, print its line, and train where asked; the exit code of that.

    Raises:
        InputError: images, weights, flags or a file of no use.
    """
    given = {**typed_options(vars(own)), "data": spec_of(own.data)}
    of_files = from_configs(own.config or (), defaults_too=True)
    settings = under_a_batch_schedule(layered(of_files, given, origin="flag"))
    if settings.run.resume is not None:
        raise InputError(f"--resume {settings.run.resume}: go on with lbaccel train --resume.")
    for note in settings.notes:
        _say(note)
    if own.print_config:
        _say(show_settings(settings, given_alone=True))
        return 0
    writable(own.out, "--out", own=Own("recipe of lbaccel start", _is_ours))
    from lbaccel.product.start import start

    found = start(settings, minutes=own.minutes, say=_say)
    atomic_write_text(own.out, found.yaml())
    _show(found, own.out)
    if not own.run:
        return 0
    from lbaccel import train

    return train.main(found.flags())


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _is_ours(path: Path) -> bool:
    from lbaccel.product.start import is_written_here

    return is_written_here(path.read_text(encoding="utf-8"))


def _show(found: Start, out: Path) -> None:
    print(f"\n{out}:\n\n{found.yaml()}", end="")
    if found.seconds is not None:
        print(f"\ntraining takes about {found.seconds / 60:.0f} minutes:")
    print(f"\n{printable(found.command())}\n", flush=True)
