"""`lbaccel advise`: a run's noise scale as advice on its batch, as JSON and drawn over training."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.noise.advice import NoiseReading, advice, samples_factor, updates_factor
from lbaccel.noise.arithmetic import rounded
from lbaccel.recipe import bounds
from lbaccel.runs.columns import columns
from lbaccel.runs.figures import check_plot
from lbaccel.runs.noise_readings import batch_of, plot, readings
from lbaccel.runs.read import Run, load_run
from lbaccel.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel advise`."""
    parser.description = (
        "How large should the batch be? The answer of the gradient noise scale, measured during a "
        "run (lbaccel train --noise-scale), for the training loss at tuned learning rates."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or wandb's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw it (.png, .svg, .pdf)")
    parser.add_argument(
        "--global-batch-size",
        type=bounds.count,
        nargs="+",
        default=(),
        metavar="B",
        help="batch sizes to compare with the run's",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out the stable rate, for which the recipe is built anew",
    )


def run(args: argparse.Namespace) -> int:
    """Print what the arguments ask for; 0, or an InputError."""
    check_plot(args.plot)
    one = load_run(args.run)
    one.warn()
    found = readings(one)
    if not found:
        raise InputError(_not_measured(args.run, one))
    batch = batch_of(one)
    batches = list(dict.fromkeys([batch, *args.global_batch_size]))
    lines, stability = ([], None) if args.quick else _stable_rate(args.run, one, batch)
    if args.json:
        content = as_json(one, found, batches) | {
            "stable_rate": None if stability is None else stability["stable_rate"],
            "stability": stability,
            "stability_advice": lines,
        }
        print(json.dumps(content, indent=1, allow_nan=False))
    else:
        print(printable("\n".join([*report(one, found, batches), *lines])))
    if args.plot is not None:
        plot(one, found, args.plot)
    return 0


def _stable_rate(folder: Path, one: Run, batch: int) -> tuple[list[str], dict[str, Any] | None]:
    """Lines on the rates of the run, and their figures; None where there are none."""
    print("measuring the stable rate (--quick leaves it out) ...", file=sys.stderr, flush=True)
    from lbaccel.stability.of_run import run_stability

    found = run_stability(folder, one, global_batch_size=batch)
    return ([found], None) if isinstance(found, str) else (found.lines(), found.to_dict())


def _not_measured(path: Path, one: Run) -> str:
    batch = one.config.get("global_batch_size")
    most = (
        f" at most {batch // 2}" if isinstance(batch, int) and batch > 1 else " of half the batch"
    )
    return (
        f"{path}: no noise/critical_batch_size in its metrics: the noise scale was not measured "
        "(it takes two micro-batches an update, and is off under ZeRO-3 and FSDP2). Train again "
        f"with: lbaccel train --noise-scale plain --micro-batch-size N, N{most}."
    )


def report(one: Run, found: Sequence[NoiseReading], batches: Sequence[int]) -> list[str]:
    """The lines of `lbaccel advise`: advice, the way there, and batch sizes beside the run's."""
    last, batch = found[-1], batches[0]
    lines = advice(last, batch)
    preconditioned = readings(one, "preconditioned_batch_size")
    if preconditioned:
        form = preconditioned[-1]
        lines.append(f"preconditioned by Adam's moments: {_short(form)} ({form.interval})")
    if len(found) > 2:
        stages = [found[len(found) // 4], found[len(found) // 2], last]
        steps = [f"{_short(r)} at {_count(r.samples_seen)}" for r in stages]
        lines.append(f"over training (samples): {', '.join(steps)}")
    if len(batches) > 1 and math.isfinite(last.critical):
        rows = [("batch", "samples, of the fewest", "updates, of the fewest", "")]
        for size in batches:
            samples = samples_factor(size, last.critical)
            updates = updates_factor(size, last.critical)
            own = "(this run)" if size == batch else ""
            rows.append((f"{size:,}", f"{samples:.2f}", f"{updates:.2f}", own))
        lines += ["", *columns(rows, "lrrl", at_least=(8,))]
    return lines


def _short(reading: NoiseReading) -> str:
    if math.isfinite(reading.critical):
        return rounded(reading.critical)
    low = reading.interval.low
    return f"above {rounded(low)}" if low > 0 else "unknown"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def as_json(one: Run, found: Sequence[NoiseReading], batches: Sequence[int]) -> dict[str, Any]:
    """The object that `--json` prints; null stands for an unbounded or unknown value."""
    last = found[-1]
    return {
        "run": one.name,
        **_plain(last),
        "global_batch_size": batches[0],
        "advice": advice(last, batches[0]),
        "batches": [
            {
                "global_batch_size": size,
                "samples_factor": _finite(samples_factor(size, last.critical)),
                "updates_factor": _finite(updates_factor(size, last.critical)),
            }
            for size in batches
        ],
        "preconditioned": [_plain(r) for r in readings(one, "preconditioned_batch_size")[-1:]],
        "history": [_plain(reading) for reading in found],
    }


def _plain(reading: NoiseReading) -> dict[str, Any]:
    return {
        "critical_batch_size": _finite(reading.critical),
        "low": _finite(reading.interval.low),
        "high": _finite(reading.interval.high),
        "interval": str(reading.interval),
        "num_updates": reading.num_updates,
        "samples_seen": reading.samples_seen,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
