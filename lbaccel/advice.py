"""`lbaccel advise`: what a run's noise scale says about its batch, in figures and drawn (no torch).

With Emin and Smin the samples and updates that a run needs in the limits of small and of large
batches, and B_crit = Emin / Smin, a batch of B needs (McCandlish et al. 2018, arXiv 1812.06162,
equations 2.11 and 2.12, solved for E = B S)

    samples E = Emin (1 + B / B_crit)        updates S = Smin (1 + B_crit / B)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, check_whole
from lbaccel.noise_arithmetic import Interval, rounded
from lbaccel.runs import Point, Run, load_run

FORMATS = (".png", ".svg", ".pdf")
AT_THE_CRITICAL_BATCH = 1.1  # a factor that the estimate can't tell from 1


@dataclass(frozen=True)
class NoiseReading:
    """One line of a run's noise scale."""

    critical: float  # S / |G|^2; infinite or nan where the averages give no number
    interval: Interval
    num_updates: float  # effective number of updates in the averages
    samples_seen: int | None = None


def samples_factor(global_batch_size: float, critical: float) -> float:
    """Samples that a batch needs over the fewest: 1 + B / B_crit.

    >>> samples_factor(3100, 3100)
    2.0
    """
    return 1.0 + global_batch_size / critical


def updates_factor(global_batch_size: float, critical: float) -> float:
    """Updates that a batch needs over the fewest: 1 + B_crit / B.

    >>> updates_factor(3100, 3100)
    2.0
    """
    return 1.0 + critical / global_batch_size


def trade(small: float, large: float, critical: float) -> tuple[float, float]:
    """What going from a small batch to a large one costs: times the samples, times fewer updates.

    >>> samples, updates = trade(3100, 16384, critical=3100)
    >>> f"{samples:.1f} times the samples for {updates:.1f} times fewer updates"
    '3.1 times the samples for 1.7 times fewer updates'
    """
    return (
        samples_factor(large, critical) / samples_factor(small, critical),
        updates_factor(small, critical) / updates_factor(large, critical),
    )


def advice(reading: NoiseReading, global_batch_size: int) -> list[str]:
    """Two lines: what they concern, and what the run's batch costs beside the critical one.

    >>> for line in advice(NoiseReading(3123.0, Interval(2613.0, 3790.0), 40.4), 16384):
    ...     print(line)
    This concerns training loss at tuned learning rates, near the end of the run (an average over
    some 40 updates; earlier the critical batch is smaller as a rule).
    critical batch about 3,100 (2,600 to 3,800): from 3,100 to 16,384 costs 3.1 times the samples
    for 1.7 times fewer updates
    """
    topic = (
        "This concerns training loss at tuned learning rates, near the end of the run (an average "
        f"over some {reading.num_updates:.0f} updates; earlier the critical batch is smaller as a "
        "rule)."
    )
    return [topic, _verdict(reading, global_batch_size)]


def _verdict(reading: NoiseReading, batch: int) -> str:
    critical, interval = reading.critical, reading.interval
    if math.isfinite(critical) and critical > 0:
        if interval.is_unknown:
            head = f"critical batch about {rounded(critical)}, but its interval excludes nothing"
            return f"{head}: too few updates to go by. A longer run says more"
        head = f"critical batch about {rounded(critical)} ({interval}): "
        small, large = sorted((critical, float(batch)))
        if large < AT_THE_CRITICAL_BATCH * small:
            return (
                f"{head}{batch:,} is there, with twice the fewest samples and twice the fewest "
                "updates"
            )
        samples, updates = trade(small, large, critical)
        names = (rounded(critical), f"{batch:,}")
        start, end = names if critical < batch else names[::-1]
        return (
            f"{head}from {start} to {end} costs {samples:.1f} times the samples for {updates:.1f} "
            "times fewer updates"
        )
    if interval.low > 0:
        head = f"critical batch above {rounded(interval.low)}, with no upper bound from this run: "
        if interval.low > batch:
            most, _ = trade(batch, 2 * batch, interval.low)
            return f"{head}twice the batch of {batch:,} costs at most {most:.2f} times the samples"
        return f"{head}whether {batch:,} is below it is not known"
    return (
        "critical batch unknown: the mean gradient does not stand out from its noise. A longer run "
        "says more"
    )


def closing_advice(noise_scale: Any, global_batch_size: int) -> str:
    """What the recipe ends with: the two lines, or why there are none.

    Args:
        noise_scale: a `NoiseScale`.
        global_batch_size: the run's.
    """
    metrics = noise_scale.metrics()
    if not metrics:
        return f"critical batch unknown: {noise_scale.reason}"
    return "\n".join(advice(reading_of(metrics), global_batch_size))


def reading_of(metrics: Mapping[str, Any], *, samples_seen: int | None = None) -> NoiseReading:
    """A reading out of a line of metrics; what is null or missing there is infinite.

    >>> reading_of({"noise/critical_batch_size": 8.0, "noise/low": 4.0, "noise/high": None})
    NoiseReading(critical=8.0, interval=Interval(low=4.0, high=inf), num_updates=0.0, ...)
    """

    def number(name: str, missing: float) -> float:
        value = metrics.get(f"noise/{name}")
        return missing if value is None else float(value)

    return NoiseReading(
        number("critical_batch_size", math.nan),
        Interval(number("low", 0.0), number("high", math.inf)),
        number("num_updates", 0.0),
        samples_seen,
    )


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
    if args.json:
        print(json.dumps(as_json(one, found, batches), indent=1, allow_nan=False))
    else:
        print("\n".join(report(one, found, batches)))
    if args.plot is not None:
        try:
            plot(one, found, args.plot)
        except OSError as error:
            raise InputError(
                f"--plot {args.plot} can't be written: {error.strerror or error}. Use another file."
            ) from error
    return 0


def batch_of(one: Run) -> int:
    """The run's global batch: that of its last line, as a schedule may have changed it.

    Raises:
        InputError: neither its lines nor its settings hold it.
    """
    logged = one.history.get("batch/global", ())
    value = logged[-1].value if logged else one.config.get("global_batch_size")
    if value is None:
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
        lines.append(
            f"preconditioned by Adam's moments: {_number(form.critical)} ({form.interval})"
        )
    if len(found) > 2:
        stages = [found[len(found) // 4], found[len(found) // 2], last]
        steps = [f"{_number(r.critical)} at {_count(r.samples_seen)}" for r in stages]
        lines.append(f"over training (samples): {', '.join(steps)}")
    if len(batches) > 1 and math.isfinite(last.critical):
        lines += ["", "batch     samples, of the fewest  updates, of the fewest"]
        for size in batches:
            samples = samples_factor(size, last.critical)
            updates = updates_factor(size, last.critical)
            own = "  (this run)" if size == batch else ""
            lines.append(f"{size:<8,}  {samples:>22.2f}  {updates:>22.2f}{own}")
    return lines


def _number(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return "unbounded" if value == math.inf else rounded(value)


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
    known = [r for r in found if r.samples_seen is not None]
    x = [r.samples_seen for r in known]
    y = [r.critical if 0 < r.critical < math.inf else math.nan for r in known]
    sizes = [
        (p.samples_seen, p.value)
        for p in one.history.get("batch/global", ())
        if p.samples_seen is not None and p.value is not None
    ]
    bounds = [v for v in (*y, *(s for _, s in sizes)) if v > 0]
    bottom, top = (min(bounds) / 4, max(bounds) * 4) if bounds else (1.0, 10.0)
    axes.fill_between(
        x,
        [max(r.interval.low, bottom) for r in known],
        [min(r.interval.high, top) for r in known],
        alpha=0.25,
        linewidth=0,
        label="95 % interval (Fieller)",
    )
    axes.plot(x, y, label="critical batch, S / |G|²", marker="o" if len(x) < 30 else None, ms=3)
    form = [r for r in readings(one, "preconditioned_batch_size") if r.samples_seen is not None]
    if form:
        values = [r.critical if 0 < r.critical < math.inf else math.nan for r in form]
        axes.plot([r.samples_seen for r in form], values, ls="--", label="preconditioned")
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
