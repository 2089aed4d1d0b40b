"""`lbaccel advise`: a run's noise scale as advice on its batch, as JSON and drawn over training."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, check_whole
from lbaccel.noise.advice import NoiseReading, advice, reading_of, samples_factor, updates_factor
from lbaccel.noise.arithmetic import rounded
from lbaccel.runs.read import Point, Run, load_run

FORMATS = (".png", ".svg", ".pdf")


def readings(run: Run, prefix: str = "critical_batch_size") -> list[NoiseReading]:
    """All of a run's lines that hold a noise scale, in order.

    Args:
        run: read by `load_run`.
        prefix: "critical_batch_size", or "preconditioned_batch_size" for that form.
    """
    ends = ("low", "high") if prefix == "critical_batch_size" else (
        "preconditioned_low",
        "preconditioned_high",
    )  # fmt: skip
    found = []
    columns = [_by_update(run, name) for name in (prefix, *ends, "num_updates")]
    for update, point in columns[0].items():
        values = [column[update].value if update in column else None for column in columns]
        named = dict(
            zip(("critical_batch_size", "low", "high", "num_updates"), values, strict=True)
        )
        line = {f"noise/{name}": value for name, value in named.items()}
        found.append(reading_of(line, samples_seen=point.samples_seen))
    return found


def _by_update(run: Run, name: str) -> dict[int, Point]:
    return {point.update: point for point in run.history.get(f"noise/{name}", ())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel advise`."""
    parser.description = (
        "How large should the batch be? What the gradient noise scale, measured during a run "
        "(lbaccel train --noise-scale), says of training loss at tuned learning rates."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or wandb's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw it (.png, .svg, .pdf)")
    parser.add_argument(
        "--global-batch-size",
        type=int,
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
    for batch in args.global_batch_size:
        check_whole("--global-batch-size", batch)
    if args.plot is not None and args.plot.suffix not in FORMATS:
        raise InputError(f"--plot {args.plot}: draw to one of {', '.join(FORMATS)}.")
    one = load_run(args.run)
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
        print("\n".join([*report(one, found, batches), *lines]))
    if args.plot is not None:
        try:
            plot(one, found, args.plot)
        except OSError as error:
            raise InputError(
                f"--plot {args.plot} can't be written: {error.strerror or error}. Use another file."
            ) from error
    return 0


def _stable_rate(folder: Path, one: Run, batch: int) -> tuple[list[str], dict[str, Any] | None]:
    """Lines on the rates of the run, and their figures; None where there are none."""
    print("measuring the stable rate (--quick leaves it out) ...", file=sys.stderr, flush=True)
    from lbaccel.stability.of_run import run_stability

    found = run_stability(folder, one, global_batch_size=batch)
    return ([found], None) if isinstance(found, str) else (found.lines(), found.to_dict())


def batch_of(one: Run) -> int:
    """The run's global batch at its end: the largest in its lines.

    A schedule only grows it, and an epoch's last update may be a short one.

    Raises:
        InputError: neither its lines nor its settings hold it.
    """
    logged = [p.value for p in one.history.get("batch/global", ()) if p.value is not None]
    value = max(logged, default=one.config.get("global_batch_size"))
    if not isinstance(value, (int, float)) or value < 1:
        raise InputError(
            f"{one.name}: its global batch is not known: no batch/global in its lines."
        )
    return int(value)


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
        lines += ["", "batch     samples, of the fewest  updates, of the fewest"]
        for size in batches:
            samples = samples_factor(size, last.critical)
            updates = updates_factor(size, last.critical)
            own = "  (this run)" if size == batch else ""
            lines.append(f"{size:<8,}  {samples:>22.2f}  {updates:>22.2f}{own}")
    return lines


def _short(reading: NoiseReading) -> str:
    if math.isfinite(reading.critical):
        return rounded(reading.critical)
    low = reading.interval.low
    return f"above {rounded(low)}" if low > 0 else "unknown"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def as_json(one: Run, found: Sequence[NoiseReading], batches: Sequence[int]) -> dict[str, Any]:
    """What `--json` prints; null is unbounded or unknown."""
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


def plot(one: Run, found: Sequence[NoiseReading], path: Path) -> None:
    """Draw the estimate with its band and the run's batch over the samples seen, log y."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, band, y = _curve(found)
    sizes = [
        (p.samples_seen, p.value)
        for p in one.history.get("batch/global", ())
        if p.samples_seen is not None and p.value is not None
    ]
    form_x, _, form_y = _curve(readings(one, "preconditioned_batch_size"))
    bounds = [v for v in (*y, *form_y, *(size for _, size in sizes)) if v > 0]
    bottom, top = (min(bounds) / 4, max(bounds) * 4) if bounds else (1.0, 10.0)
    low, high = ([min(max(v, bottom), top) for v in side] for side in band)
    axes.fill_between(x, low, high, alpha=0.25, linewidth=0, label="95 % interval (Fieller)")
    axes.plot(x, y, label="critical batch, S / |G|²", marker="o" if len(x) < 30 else None, ms=3)
    if form_x:
        axes.plot(form_x, form_y, ls="--", label="preconditioned")
    if sizes:
        axes.plot(*zip(*sizes, strict=True), color="0.3", ls=":", label="this run's global batch")
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlabel("samples seen")
    axes.set_ylabel("samples a batch")
    axes.set_title(f"{one.name}\ntraining loss at tuned learning rates", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=120)


def _curve(found: Sequence[NoiseReading]) -> tuple[list[int], list[list[float]], list[float]]:
    """Samples seen, the interval's ends, and the estimate, nan where there is none."""
    known = [(r.samples_seen, r) for r in found if r.samples_seen is not None]
    band = [[r.interval.low for _, r in known], [r.interval.high for _, r in known]]
    values = [r.critical if 0 < r.critical < math.inf else math.nan for _, r in known]
    return [samples for samples, _ in known], band, values
