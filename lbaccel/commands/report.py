"""`lbaccel report`: runs and studies as one HTML file that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbaccel.recipe import bounds
from lbaccel.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel report`."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN_OR_STUDY",
        help="run folder, wandb's offline folder, or the results folder of a study",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write (default: report.html)",
    )
    parser.add_argument("--metric", default="val/top1", help="of runs (default: val/top1)")
    parser.add_argument(
        "--target", type=bounds.finite, help="of runs: value whose first reaching is timed"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; 0, or an InputError."""
    from lbaccel.report.page import REPORT
    from lbaccel.report.parts import report
    from lbaccel.runs.folder import atomic_write_text
    from lbaccel.runs.outputs import writable

    writable(args.output, "--output", own=REPORT)
    text, parts = report(args.paths, metric=args.metric, target=args.target)
    atomic_write_text(args.output, text)
    for part in parts:
        print(printable(part.content["verdict"][0]))
    print(printable(f"{args.output} ({len(text.encode()) / 1e6:.2f} MB)"))
    return 0
