"""`lbaccel compare`: finished runs as a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbaccel.recipe import bounds
from lbaccel.runs.compare import (
    AXIS_LABELS,
    TABLE_FILE,
    aligned,
    as_csv,
    compared_settings,
    distinct_names,
    markdown,
    plot,
    settings_line,
    split_settings,
    table,
)
from lbaccel.runs.figures import check_plot
from lbaccel.runs.folder import atomic_write_text
from lbaccel.runs.outputs import writable
from lbaccel.runs.read import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or wandb's")
    parser.add_argument("--x", choices=tuple(AXIS_LABELS), default="samples", help="axis")
    parser.add_argument("--metric", default="val/top1", help="such as val/top1 or train/loss")
    parser.add_argument("--target", type=bounds.finite, help="value whose first reaching is timed")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--md", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the metric (.png, .svg)")


def run(args: argparse.Namespace) -> int:
    """Print the comparison that the arguments ask for; 0, or an InputError."""
    check_plot(args.plot)
    if args.csv is not None:
        writable(args.csv, "--csv", own=TABLE_FILE)
    runs = distinct_names([load_run(path) for path in args.runs])
    for one in runs:
        one.warn()
    rows = table(runs, args.metric, x=args.x, target=args.target)
    equal, _ = split_settings(compared_settings([one.config for one in runs]))
    print(settings_line(equal, len(runs)))
    print(markdown(rows, args.metric) if args.md else aligned(rows, args.metric))
    if args.csv is not None:
        atomic_write_text(args.csv, as_csv(rows))
    if args.plot is not None:
        plot(runs, args.plot, metric=args.metric, x=args.x, target=args.target)
    return 0
