"""`lbaccel eval`: a trained model judged on images with labels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbaccel.launch import rank
from lbaccel.recipe import bounds
from lbaccel.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel eval`."""
    parser.add_argument(
        "path",
        metavar="RUN|CHECKPOINT|EXPORT",
        help="run folder (its best checkpoint), RUN/checkpoints/last, export, hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "--data", metavar="SPEC", help="images, such as folder:PATH (default: the run's own)"
    )
    parser.add_argument("--split", default="val", help="val or test (default: val)")
    parser.add_argument(
        "--tta", metavar="flip", help="mean of the probabilities of image and mirror image"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights (of a run: the best one)"
    )
    parser.add_argument(
        "--against", metavar="RUN2", help="another model on the same images, with McNemar's test"
    )
    parser.add_argument(
        "--fail-below",
        type=bounds.of_images,
        metavar="SHARE",
        help="exit code 1 where top-1 is below this share, such as 0.9",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the files (default: RUN/eval/NAME)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, and write the files; 1 where top-1 is below what was asked for."""
    least: float | None = args.fail_below
    from lbaccel.product.evaluate import evaluate
    from lbaccel.product.words import below, report
    from lbaccel.runs.folder import strict_json

    def say(line: str) -> None:
        if rank() == 0:
            print(printable(line), file=sys.stderr)

    result = evaluate(
        args.path,
        args.data,
        split=args.split,
        tta=args.tta,
        ema=args.ema,
        against=args.against,
        output=args.output,
        say=say,
    )
    if rank() == 0 and args.json:
        print(strict_json(result.as_json(), indent=1))
    elif rank() == 0:
        print(report(result))
        if result.folder is None:
            print("no files were written: for them, add --output DIR")
        else:
            print(printable(f"files: {result.folder}"))
    missed = None if least is None else below(result, least)
    if missed is not None:
        say(missed)
    return 0 if missed is None else 1
