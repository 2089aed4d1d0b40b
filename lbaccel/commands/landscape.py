"""`lbaccel landscape`: the loss around trained weights, or on the line between two models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbaccel.landscape.axes import axis_of
from lbaccel.launch import rank
from lbaccel.recipe import bounds
from lbaccel.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel landscape`."""
    parser.add_argument(
        "path",
        metavar="CHECKPOINT",
        help="run folder (its best checkpoint), RUN/checkpoints/last, export, hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "second", nargs="?", metavar="CHECKPOINT2", help="another model of this network, at x = 1"
    )
    parser.add_argument(
        "--x",
        type=axis_of,
        metavar="LOW:HIGH:POINTS",
        help="default: -1:1:51, and -0.5:1.5:51 between two models",
    )
    parser.add_argument(
        "--y", type=axis_of, metavar="LOW:HIGH:POINTS", help="a second direction: a surface"
    )
    parser.add_argument(
        "--direction",
        choices=("weights", "states"),
        help="states moves BatchNorm's statistics too (default: weights; states with CHECKPOINT2)",
    )
    parser.add_argument(
        "--norm",
        choices=("filter", "layer", "weight"),
        help="scale of a random direction (default: filter)",
    )
    parser.add_argument(
        "--ignore",
        choices=("biasbn", "none"),
        help="biasbn leaves tensors of one dimension where they are (default)",
    )
    add_images(parser, samples=None)
    parser.add_argument("--seed", type=bounds.seed, help="of the random directions (default: 0)")
    parser.add_argument("--json", action="store_true", help="print landscape.json alone")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the files; a part of the same landscape is gone on with (default: "
        "RUN/landscapes/NAME)",
    )


def add_images(parser: argparse.ArgumentParser, *, samples: int | None) -> None:
    """The arguments that say on which images a loss is computed, by default on so many."""
    parser.add_argument(
        "--data",
        choices=("train", "val"),
        default="train",
        help="training images without augmentation, or validation images (default: train)",
    )
    parser.add_argument(
        "--images", metavar="SPEC", help="such as folder:PATH (default: the run's own images)"
    )
    parser.add_argument(
        "--samples",
        type=bounds.count,
        default=samples,
        metavar="N",
        help=f"so many of them, always the same ones (default: {samples or 'all'})",
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights")


def say(line: str) -> None:
    """Print a line of the first rank to standard error."""
    if rank() == 0:
        print(printable(line), file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Compute what is missing, write the files, and print what the surface says."""
    from lbaccel.landscape.landscape import loss_landscape
    from lbaccel.landscape.words import report
    from lbaccel.runs.folder import strict_json

    result = loss_landscape(
        args.path,
        args.second,
        x=args.x,
        y=args.y,
        direction=args.direction,
        norm=args.norm,
        ignore=args.ignore,
        split=args.data,
        images=args.images,
        samples=args.samples,
        seed=args.seed,
        ema=args.ema,
        output=args.output,
        say=say,
    )
    if rank() == 0 and args.json:
        print(strict_json(result.as_json(), indent=1))
    elif rank() == 0:
        print(report(result))
    return 0
