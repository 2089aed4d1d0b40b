"""`lbaccel compare`: finished runs as a table and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lbaccel.recipe import bounds
from lbaccel.recipe.experiment import beside_defaults, with_experiment
from lbaccel.runs.compare import (
    AXIS_LABELS,
    TABLE_FILE,
    Cell,
    aligned,
    as_csv,
    distinct_names,
    markdown,
    settings_line,
    split_settings,
    table,
)
from lbaccel.runs.compare_figure import plot
from lbaccel.runs.figures import check_plot
from lbaccel.runs.folder import atomic_write_text, strict_json
from lbaccel.runs.groups import (
    LEVEL,
    Group,
    are_grouped,
    comparison,
    group_rows,
    groups_of,
    left_out,
    numbers_of,
    with_groups,
)
from lbaccel.runs.outputs import writable
from lbaccel.runs.read import Run, load_run
from lbaccel.runs.read_cloud import is_cloud, load_wandb_cloud


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel compare`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, wandb's offline folder, or wandb:ENTITY/PROJECT[/RUN_ID]",
    )
    parser.add_argument("--x", choices=tuple(AXIS_LABELS), default="samples", help="axis")
    parser.add_argument("--metric", default="val/top1", help="such as val/top1 or train/loss")
    parser.add_argument("--target", type=bounds.finite, help="value whose first reaching is timed")
    parser.add_argument(
        "--plan", action="store_true", help="compare the plans too, such as the micro-batch"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--md", action="store_true", help="print Markdown tables")
    shown.add_argument("--json", action="store_true", help="print runs and groups as JSON alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the metric (.png, .svg)")


def run(args: argparse.Namespace) -> int:
    """Print the comparison that the arguments ask for; 0, or an InputError."""
    check_plot(args.plot)
    if args.csv is not None:
        writable(args.csv, "--csv", own=TABLE_FILE)
    runs = distinct_names([one for target in args.runs for one in _load(target)])
    for one in runs:
        one.warn()
    runs = with_experiment(runs, plan=args.plan)
    rows = table(runs, args.metric, x=args.x, target=args.target)
    groups = groups_of(runs)
    wider = with_groups(runs, rows, groups, args.metric)
    if args.json:
        _print_json(runs, wider, groups, metric=args.metric)
    else:
        _print_tables(runs, rows, groups, metric=args.metric, md=args.md)
    for note in left_out(groups, args.metric):
        print(f"note: {note}", file=sys.stderr)
    if args.csv is not None:
        atomic_write_text(args.csv, as_csv(wider))
    if args.plot is not None:
        plot(runs, args.plot, metric=args.metric, x=args.x, target=args.target)
    return 0


def _load(target: str) -> list[Run]:
    return load_wandb_cloud(target) if is_cloud(target) else [load_run(Path(target))]


def _print_json(
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, Cell]],
    groups: Sequence[Group],
    *,
    metric: str,
) -> None:
    print(strict_json(comparison(runs, rows, groups, metric), indent=1))


def _print_tables(
    runs: Sequence[Run],
    rows: Sequence[dict[str, Cell]],
    groups: Sequence[Group],
    *,
    metric: str,
    md: bool,
) -> None:
    write = markdown if md else aligned
    equal, _ = split_settings([one.config for one in runs])
    told = beside_defaults(equal)
    print(settings_line(told, len(runs), others=len(equal) - len(told)))
    if are_grouped(groups):
        print(write(group_rows(groups, metric), metric))
        print(
            "\nThe runs of a group differ only in their seed. "
            f"± {100 * LEVEL:g} %: half the width of\nStudent's t-interval of the mean.\n"
        )
        rows = [_of_group(*pair) for pair in zip(numbers_of(runs, groups), rows, strict=True)]
    print(write(rows, metric))


def _of_group(number: int, row: Mapping[str, Cell]) -> dict[str, Cell]:
    """A row with the number of its group, which has the delta."""
    rest = {key: value for key, value in row.items() if key not in ("name", "delta")}
    return {"name": row["name"], "group": number, **rest}
