"""`lbaccel schedule`: the phases of a batch-size schedule, their updates, and a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from math import ceil
from pathlib import Path

from lbaccel.batch.growth import PAST_MAX
from lbaccel.batch.rules import RULES
from lbaccel.optim.schedules import WARMUPS
from lbaccel.recipe import bounds
from lbaccel.recipe.schedule_flags import DECAYS, LR_RULES, ScheduleFlags, compose
from lbaccel.recipe.schedule_table import ScheduleTable, plot
from lbaccel.runs.columns import columns
from lbaccel.runs.figures import check_plot

Group = argparse._ArgumentGroup  # argparse gives it no other name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The batch, the run, the learning rate, and the output."""
    parser.description = (
        "Phases of a batch-size schedule: batch size, learning rate and updates from each epoch "
        "on. Epochs are numbered from 1, and a change happens at the start of its epoch."
    )
    _add_batch(parser.add_argument_group("the batch"))
    _add_length(parser.add_argument_group("the run: one of --epochs and --samples"))
    _add_rate(parser.add_argument_group("the learning rate"))
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    shown.add_argument("--plot", type=Path, metavar="F", help="draw it (.png, .svg, .pdf)")


def _add_batch(batch: Group) -> None:
    batch.add_argument(
        "--batch-schedule", choices=RULES, required=True, metavar="RULE", help=", ".join(RULES)
    )
    batch.add_argument(
        "--global-batch-size",
        type=bounds.count,
        required=True,
        metavar="B",
        help="samples an update, first",
    )
    batch.add_argument(
        "--milestones",
        type=bounds.epochs,
        nargs="+",
        metavar="E",
        help="default: 60 120 160 of 200, in proportion",
    )
    batch.add_argument(
        "--factor",
        type=bounds.positive,
        nargs="+",
        metavar="F",
        help="one, or one a milestone; default: 5 (mixed: 4 4 50, fast: 2)",
    )
    batch.add_argument(
        "--max-batch-size", type=bounds.count, metavar="M", help="default: --num-samples"
    )
    batch.add_argument(
        "--past-max",
        choices=PAST_MAX,
        default="drop",
        metavar="|".join(PAST_MAX),
        help="what to do with the part of a growth factor that exceeds --max-batch-size: drop it "
        "(default), or divide the learning rate by it",
    )
    for flag, what in (("--growth", "batch; default: 2"), ("--lr-growth", "rate; default: 1.3")):
        batch.add_argument(
            flag, type=bounds.positive, metavar="F", help=f"fast, instant: of the {what}"
        )
    batch.add_argument(
        "--batch-sizes",
        type=bounds.count,
        nargs="+",
        metavar="B",
        help="listed: from each milestone on",
    )
    batch.add_argument(
        "--lr-factors",
        type=bounds.positive,
        nargs="+",
        metavar="F",
        help="listed: multiples of the first learning rate from each milestone on",
    )
    batch.add_argument(
        "--first-epoch",
        type=bounds.count,
        metavar="E",
        help="fast, instant: first larger batch; default: 6",
    )
    batch.add_argument("--world-size", type=bounds.ranks, default=1, metavar="W", help="default: 1")


def _add_length(length: Group) -> None:
    length.add_argument("--epochs", type=bounds.epochs, metavar="E")
    length.add_argument("--samples", type=bounds.count, metavar="S", help="in all epochs together")
    length.add_argument(
        "--num-samples", type=bounds.count, required=True, metavar="N", help="of the training set"
    )
    length.add_argument(
        "--last-update",
        choices=("keep", "wrap", "drop"),
        default="keep",
        metavar="keep|wrap|drop",
        help="an epoch's remainder: a short update (default), into the next epoch, or left out "
        "(one batch size alone)",
    )


def _add_rate(rate: Group) -> None:
    rate.add_argument(
        "--base-lr",
        type=bounds.positive,
        required=True,
        metavar="LR",
        help="at --global-batch-size; with --lr-scaling, at --base-batch-size",
    )
    rate.add_argument(
        "--lr-scaling",
        choices=LR_RULES,
        default="none",
        metavar="RULE",
        help=f"{', '.join(LR_RULES)} (default)",
    )
    rate.add_argument(
        "--lr-exponent", type=bounds.not_negative, metavar="P", help="of the rule power"
    )
    rate.add_argument("--base-batch-size", type=bounds.count, metavar="B0")
    rate.add_argument(
        "--warmup", choices=WARMUPS, default="none", metavar="SHAPE", help=", ".join(WARMUPS)
    )
    rate.add_argument("--warmup-epochs", type=bounds.epochs_from_zero, metavar="E")
    rate.add_argument(
        "--warmup-start",
        type=bounds.start_rate,
        metavar="LR",
        help="of gradual and constant: reference (--base-lr, default), zero or a learning rate",
    )
    rate.add_argument(
        "--schedule",
        choices=DECAYS,
        default="constant",
        metavar="SHAPE",
        help="constant, cosine: times the rule's",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the phases, draw them where asked; 0.

    Raises:
        InputError: see `compose`; a plot in another format or that can't be written.
    """
    a = arguments
    check_plot(a.plot, parents=True)
    flags = {field.name: getattr(a, field.name) for field in fields(ScheduleFlags)}
    table, notes = compose(ScheduleFlags(**flags))
    if a.plot is not None:
        plot(table, a.plot, title="\n".join(headlines(table, a)))
    print(as_json(table, notes, a) if a.json else "\n".join(lines(table, notes, a)))
    return 0


def headlines(table: ScheduleTable, a: argparse.Namespace) -> Iterator[str]:
    """The number of updates of the schedule, and its share of the steady run's."""
    yield (
        f"{a.batch_schedule}: {table.num_updates} updates in {table.epochs:.10g} epochs of "
        f"{a.num_samples} samples (last update: {a.last_update})"
    )
    if table.num_updates != table.num_updates_steady:
        share = table.num_updates / table.num_updates_steady
        yield f"{share:.3g} of the steady run's {table.num_updates_steady}"


def lines(table: ScheduleTable, notes: Sequence[str], a: argparse.Namespace) -> Iterator[str]:
    """The schedule for people."""
    yield ", ".join(headlines(table, a))
    last_lr = ["last lr"] if table.moves else []
    grid = [["epochs", "global batch", "lr", *last_lr, "updates"]]
    lasts = [*(row.epoch - 1 for row in table.rows[1:]), ceil(table.epochs)]
    for row, last in zip(table.rows, lasts, strict=True):
        rates = [row.lr, row.last_lr] if table.moves else [row.lr]
        grid.append(
            [
                f"{row.epoch}-{last}" if last > row.epoch else str(last),
                str(row.global_batch_size),
                *(f"{rate:.6g}" for rate in rates),
                str(row.num_updates),
            ]
        )
    yield from columns(grid, "r")
    yield from notes
    if a.plot is not None:
        yield f"drawn: {a.plot}"


def as_json(table: ScheduleTable, notes: Sequence[str], a: argparse.Namespace) -> str:
    """The schedule for programs."""
    return json.dumps(
        {
            "batch_schedule": a.batch_schedule,
            "epochs": table.epochs,
            "num_samples": a.num_samples,
            "last_update": a.last_update,
            "segments": [asdict(row) for row in table.rows],
            "num_updates": table.num_updates,
            "num_updates_steady": table.num_updates_steady,
            "update_ratio": table.num_updates / table.num_updates_steady,
            "notes": list(notes),
        },
        indent=1,
        allow_nan=False,
    )
