"""`lbaccel schedule`: the segments of a batch-size schedule, their updates, and a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path

from lbaccel.batch.duration import Duration
from lbaccel.batch.phases import Segment, segment_stream
from lbaccel.batch.rules import PAST_MAX, RULES, batch_schedule
from lbaccel.errors import InputError, check_choice, check_number, check_whole
from lbaccel.optim.scaling import explain_lr, scale_lr
from lbaccel.optim.schedules import WARMUPS, Schedule, make_schedule, warmup_start
from lbaccel.recipe.growth import milestones
from lbaccel.recipe.schedule_table import ScheduleTable, plot, schedule_table
from lbaccel.recipe.values import start_rate
from lbaccel.runs.columns import columns
from lbaccel.runs.figures import check_plot

DECAYS = ("constant", "cosine")
LR_RULES = ("linear", "sqrt", "power", "none")
MOST_EPOCHS = 10**9  # beyond, a drawing's axis and float64's samples end
KEEPS_FACTORS = ("bsi", "bsi-doubled-end", "mixed")  # they read past_max


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The batch, the run, the learning rate, and the output."""
    parser.description = (
        "Segments of a batch-size schedule: batch size, learning rate and updates from each epoch "
        "on. Epochs are numbered from 1, and a change happens at the start of its epoch."
    )
    batch = parser.add_argument_group("the batch")
    batch.add_argument("--batch-schedule", required=True, metavar="RULE", help=", ".join(RULES))
    batch.add_argument(
        "--global-batch-size", type=int, required=True, metavar="B", help="samples an update, first"
    )
    batch.add_argument(
        "--milestones",
        type=float,
        nargs="+",
        metavar="E",
        help="default: 60 120 160 of 200, in proportion",
    )
    batch.add_argument(
        "--factor",
        type=float,
        nargs="+",
        metavar="F",
        help="one, or one a milestone; default: 5 (mixed: 4 4 50, fast: 2)",
    )
    batch.add_argument("--max-batch-size", type=int, metavar="M", help="default: --num-samples")
    batch.add_argument(
        "--past-max",
        default="drop",
        metavar="|".join(PAST_MAX),
        help="what of a factor the maximum leaves no room for is lost (default), or divides the "
        "learning rate",
    )
    for flag, what in (("--growth", "batch; default: 2"), ("--lr-growth", "rate; default: 1.3")):
        batch.add_argument(flag, type=float, metavar="F", help=f"fast, instant: of the {what}")
    batch.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="B", help="listed: from each milestone on"
    )
    batch.add_argument(
        "--lr-factors",
        type=float,
        nargs="+",
        metavar="F",
        help="listed: multiples of the first learning rate from each milestone on",
    )
    batch.add_argument(
        "--first-epoch", type=int, metavar="E", help="fast, instant: first larger batch; default: 6"
    )
    batch.add_argument("--world-size", type=int, default=1, metavar="W", help="default: 1")
    length = parser.add_argument_group("the run: one of --epochs and --samples")
    length.add_argument("--epochs", type=float, metavar="E")
    length.add_argument("--samples", type=int, metavar="S", help="in all epochs together")
    length.add_argument(
        "--num-samples", type=int, required=True, metavar="N", help="of the training set"
    )
    length.add_argument(
        "--last-update",
        default="keep",
        metavar="keep|wrap|drop",
        help="an epoch's remainder: a short update (default), into the next epoch, or left out "
        "(one batch size alone)",
    )
    rate = parser.add_argument_group("the learning rate")
    rate.add_argument(
        "--base-lr",
        type=float,
        required=True,
        metavar="LR",
        help="at --global-batch-size; with --lr-scaling, at --base-batch-size",
    )
    rate.add_argument(
        "--lr-scaling", default="none", metavar="RULE", help=f"{', '.join(LR_RULES)} (default)"
    )
    rate.add_argument("--lr-exponent", type=float, metavar="P", help="of the rule power")
    rate.add_argument("--base-batch-size", type=int, metavar="B0")
    rate.add_argument("--warmup", default="none", metavar="SHAPE", help=", ".join(WARMUPS))
    rate.add_argument("--warmup-epochs", type=float, metavar="E")
    rate.add_argument(
        "--warmup-start",
        metavar="LR",
        help="of gradual and constant: reference (--base-lr, default), zero or a learning rate",
    )
    rate.add_argument(
        "--schedule", default="constant", metavar="SHAPE", help="constant, cosine: times the rule's"
    )
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    shown.add_argument("--plot", type=Path, metavar="F", help="draw it (.png, .svg, .pdf)")


def run(arguments: argparse.Namespace) -> int:
    """Print the segments, draw them where asked; 0.

    Raises:
        InputError: see `compose`; a plot in another format or that can't be written.
    """
    a = arguments
    check_plot(a.plot, parents=True)
    table, notes = compose(a)
    if a.plot is not None:
        plot(table, a.plot, title="\n".join(headlines(table, a)))
    print(as_json(table, notes, a) if a.json else "\n".join(lines(table, notes, a)))
    return 0


def compose(a: argparse.Namespace) -> tuple[ScheduleTable, list[str]]:
    """The schedule of the flags, with warmup and decay, and notes on it.

    Raises:
        InputError: see `batch_schedule`, `segment_updates`, `scale_lr` and `make_schedule`; no
            length of the run or two, scaling without a reference batch, a batch below the world
            size, a warmup that does not rise.
    """
    check_choice("batch_schedule", a.batch_schedule, choices=RULES)
    check_choice("schedule", a.schedule, choices=DECAYS)
    epochs = _epochs(a)
    build = partial(
        batch_schedule,
        a.batch_schedule,
        global_batch_size=a.global_batch_size,
        epochs=epochs,
        num_samples=a.num_samples,
        milestones=milestones(a.milestones, rule=a.batch_schedule, epochs=epochs),
        factors=a.factor,
        max_batch_size=a.max_batch_size,
        growth=a.growth,
        lr_growth=a.lr_growth,
        first_epoch=a.first_epoch,
        batch_sizes=a.batch_sizes,
        lr_factors=a.lr_factors,
    )
    segments = build(past_max=a.past_max)
    stream = segment_stream(segments, num_samples=a.num_samples, last_update=a.last_update)
    _check_ranks(segments, a.world_size)
    first_lr, notes = _first_lr(a)
    table = schedule_table(
        segments,
        epochs=epochs,
        num_samples=a.num_samples,
        last_update=a.last_update,
        first_lr=first_lr,
        multiplier=_multiplier(
            a, peak_lr=first_lr, epochs=epochs, samples_per_epoch=stream.samples_per_epoch
        ),
    )
    if a.past_max == "drop" and a.batch_schedule in KEEPS_FACTORS:
        notes += _lost(segments, build(past_max="lr"))
    notes += [
        f"From epoch {row.epoch} on there is no update: the run ends inside one of those before."
        for row in table.rows
        if not row.num_updates
    ]
    return table, notes


def _epochs(a: argparse.Namespace) -> float:
    """The length of the run."""
    check_whole("num_samples", a.num_samples)
    if a.epochs is not None and a.samples is not None:
        raise InputError(
            f"--epochs {a.epochs:.10g} and --samples {a.samples}: a run has one length. "
            "Use one of the two."
        )
    if a.samples is not None:
        check_whole("samples", a.samples)
        if a.samples > MOST_EPOCHS * a.num_samples:
            raise InputError(
                f"--samples {a.samples} are more than {MOST_EPOCHS} epochs. Use fewer."
            )
        return a.samples / a.num_samples
    if a.epochs is None:
        raise InputError("the run has no length. Use --epochs 200, or --samples for the total.")
    check_number("epochs", a.epochs, at_most=MOST_EPOCHS)
    return a.epochs


def _check_ranks(segments: Sequence[Segment], world_size: int) -> None:
    check_whole("world_size", world_size)
    smallest = min(segments, key=lambda segment: segment.global_batch_size)
    if smallest.global_batch_size < world_size:
        raise InputError(
            f"global_batch_size={smallest.global_batch_size} from epoch {smallest.epoch} on is "
            f"smaller than world_size={world_size}: every rank needs at least one sample. "
            f"Use --world-size <= {smallest.global_batch_size}, or a larger --global-batch-size."
        )


def _first_lr(a: argparse.Namespace) -> tuple[float, list[str]]:
    """The learning rate of the first segment, and how it came about."""
    check_choice("lr_scaling", a.lr_scaling, choices=LR_RULES)
    check_number("base_lr", a.base_lr)
    if a.lr_scaling == "none":
        if a.lr_exponent is not None:
            raise InputError(
                f"--lr-exponent {a.lr_exponent:g} is not read without --lr-scaling power. Add it, "
                "or leave the exponent out."
            )
        if a.base_batch_size is not None:
            raise InputError(
                f"--base-batch-size {a.base_batch_size} is not read without a rule: --base-lr "
                f"{a.base_lr:g} is the learning rate at {a.global_batch_size}. "
                "Add --lr-scaling linear, or leave it out."
            )
        return a.base_lr, []
    if a.base_batch_size is None:
        raise InputError(
            f"--lr-scaling {a.lr_scaling} has no reference: at which batch is the learning rate "
            f"{a.base_lr:g}? Add --base-batch-size 256, say, or leave --lr-scaling out where it is "
            f"that of {a.global_batch_size}."
        )
    given = {
        "base_batch_size": a.base_batch_size,
        "global_batch_size": a.global_batch_size,
        "rule": a.lr_scaling,
        "exponent": a.lr_exponent,
    }
    return scale_lr(a.base_lr, **given), [explain_lr(a.base_lr, **given)]


def _multiplier(
    a: argparse.Namespace, *, peak_lr: float, epochs: float, samples_per_epoch: int
) -> Schedule:
    """Warmup and decay."""
    if a.warmup == "none":
        for flag, value in (("epochs", a.warmup_epochs), ("start", a.warmup_start)):
            if value is not None:
                raise InputError(
                    f"--warmup-{flag} {value} is not read without a warmup. Add --warmup gradual."
                )
    elif a.warmup_epochs is None:
        raise InputError(f"--warmup {a.warmup} has no length. Add --warmup-epochs 5, say.")
    start = _warmup_start(a.warmup_start)
    if a.warmup in ("gradual", "constant") and warmup_start(a.base_lr, peak_lr, start=start) == 1:
        raise InputError(
            f"--warmup {a.warmup} starts at its own peak, {peak_lr:.6g}, so nothing rises. "
            "Use --warmup-start zero, or --lr-scaling with --base-batch-size (it then starts at "
            "--base-lr)."
        )
    return make_schedule(
        total=Duration(epochs=epochs),
        base_lr=a.base_lr,
        peak_lr=peak_lr,
        global_batch_size=a.global_batch_size,
        num_samples=samples_per_epoch,
        decay=a.schedule,
        warmup=a.warmup,
        warmup_duration=None if a.warmup_epochs is None else Duration(epochs=a.warmup_epochs),
        start=start,
    )


def _warmup_start(text: str | None) -> float | str:
    try:
        return "reference" if text is None else start_rate(text)
    except ValueError:
        raise InputError(
            f"--warmup-start {text} is not 'reference', 'zero' or a learning rate. Use one of them."
        ) from None


def _lost(segments: Sequence[Segment], kept: Sequence[Segment]) -> list[str]:
    """What the maximum cut off: `kept` gives it to the learning rate."""
    share = segments[-1].lr_factor / kept[-1].lr_factor
    if share == 1:
        return []
    first = next(segment for segment in kept if segment not in segments)
    return [
        f"At {segments[-1].global_batch_size} samples, the maximum, a factor of {share:.6g} is "
        f"lost from epoch {first.epoch} on (--past-max lr: it divides the learning rate)."
    ]


def headlines(table: ScheduleTable, a: argparse.Namespace) -> Iterator[str]:
    """What runs, and what it saves."""
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
