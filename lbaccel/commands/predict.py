"""`lbaccel predict`: a trained model on images without labels, as CSV."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbaccel.errors import InputError
from lbaccel.launch import asks_for_ranks
from lbaccel.recipe import bounds
from lbaccel.text import printable

USUAL_TOPK = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel predict`."""
    parser.add_argument(
        "path",
        metavar="RUN|CHECKPOINT|EXPORT|hf-hub:NAME",
        help="run folder (its best checkpoint), RUN/checkpoints/last, export, hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES|FOLDER|GLOB|-",
        help="images; a folder is walked; - reads names of files from standard input",
    )
    parser.add_argument(
        "--topk", type=bounds.count, metavar="K", help="classes a file (default: 5)"
    )
    parser.add_argument(
        "--threshold",
        type=bounds.of_images,
        metavar="SHARE",
        help="add the column unsure: 1 where the first probability is below, such as 0.8",
    )
    parser.add_argument(
        "--sort-into", type=Path, metavar="FOLDER", help="copy each image to FOLDER/CLASS"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the CSV to a file")
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights (of a run: the best one)"
    )


def run(args: argparse.Namespace) -> int:
    """Write a line for each file as it is predicted; 1 where a file could not be read."""
    threshold: float | None = args.threshold
    if asks_for_ranks():
        raise InputError("lbaccel predict runs in one process. Start it without a launcher.")
    from lbaccel.product.inputs import files_named
    from lbaccel.product.prediction import predictions, temperature_of
    from lbaccel.product.prediction_table import PREDICTIONS, header, row
    from lbaccel.product.sorting import Sorter
    from lbaccel.recipe.trained_model import read_trained
    from lbaccel.runs.folder import atomic_write_text
    from lbaccel.runs.outputs import writable

    out: Path | None = args.out
    if out is not None:
        writable(out, "--out", own=PREDICTIONS)
    files = files_named(args.files, stream=sys.stdin.buffer)
    trained = read_trained(args.path, ema=args.ema)
    there = trained.num_named or len(trained.classes)
    topk = min(args.topk or USUAL_TOPK, there)
    if args.topk is not None and args.topk > there:
        print(f"note: the model has {there} classes, so that many are given", file=sys.stderr)
    temperature = temperature_of(trained)
    if threshold is not None or temperature.source is not None:
        print(printable(str(temperature)), file=sys.stderr)
    sorter = None
    if args.sort_into is not None:
        sorter = Sorter(args.sort_into, trained.classes, unsure=threshold is not None)
    columns = {"topk": topk, "threshold": threshold is not None}
    lines, unread = [header(**columns)], 0
    if out is None:
        print(lines[0], end="", flush=True)
    for found in predictions(
        trained, files, topk=topk, threshold=threshold, temperature=temperature
    ):
        line = row(found, **columns)
        if out is None:
            print(line, end="", flush=True)
        else:
            lines.append(line)
        unread += bool(found.error)
        if sorter is not None:
            sorter.take(found)
    if out is not None:
        atomic_write_text(out, "".join(lines))
    if unread:
        print(f"{unread} of {len(files)} files could not be read: column error", file=sys.stderr)
    return 1 if unread else 0
