"""A run's noise scale, read again out of its metrics, and drawn over training (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lbaccel.errors import InputError
from lbaccel.noise.advice import NoiseReading, reading_of
from lbaccel.runs.figures import new_figure, save
from lbaccel.runs.read import Point, Run
from lbaccel.text import in_figure


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
    found: list[NoiseReading] = []
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


def plot(one: Run, found: Sequence[NoiseReading], path: Path) -> None:
    """Draw the estimate with its band and the run's batch over the samples seen, log y."""
    figure = new_figure(7, 4.5)
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
    axes.set_title(f"{in_figure(one.name)}\ntraining loss at tuned learning rates", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    save(figure, path)


def _curve(found: Sequence[NoiseReading]) -> tuple[list[int], list[list[float]], list[float]]:
    """Samples seen, the interval's ends, and the estimate, nan where there is none."""
    known = [(r.samples_seen, r) for r in found if r.samples_seen is not None]
    band = [[r.interval.low for _, r in known], [r.interval.high for _, r in known]]
    values = [r.critical if 0 < r.critical < math.inf else math.nan for _, r in known]
    return [samples for samples, _ in known], band, values
