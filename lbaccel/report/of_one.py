"""A single run beside its curves: speed, memory, noise, rate, evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.noise.advice import advice
from lbaccel.report.chart import Chart, Landmark, Stroke
from lbaccel.report.curves import Strand, panels
from lbaccel.report.judged import judged
from lbaccel.report.pictures import PictureRoom
from lbaccel.runs.compare import AXIS_LABELS
from lbaccel.runs.noise_readings import batch_of, readings
from lbaccel.runs.read import Run
from lbaccel.runs.thin import kept, rounded

MORE = ("perf/samples_per_second", "memory/peak_gib", "optim/lr", "optim/grad_norm")
_TITLES = {
    "perf/samples_per_second": ("Throughput", "samples per second"),
    "memory/peak_gib": ("Peak memory", "peak memory (GiB)"),
    "optim/lr": ("Learning rate", "learning rate"),
    "optim/grad_norm": ("Norm of the gradient", "norm of the gradient"),
}
_NOISE_POINTS = 400


def drawn(
    one: Run, *, share: Mapping[str, int], marks: Sequence[Landmark], on_cpu: bool
) -> dict[str, Any]:
    """Facts of a run, and its charts beside the curves, for the template."""
    return {
        "facts": facts(one, on_cpu=on_cpu),
        "panels": more_panels(one, "one", share=share, marks=marks, on_cpu=on_cpu),
        "noise": noise_chart(one, "noise"),
    }


def more_panels(
    one: Run, key: str, *, share: Mapping[str, int], marks: Sequence[Landmark], on_cpu: bool
) -> list[Chart]:
    """Throughput, memory, rate and gradient of a run."""
    strand = Strand(one.name, "", [(one.name, one.history)])
    found = []
    for place, metric in enumerate(MORE):
        predicted = None if on_cpu else predicted_gib(one)
        of = [*marks]
        if metric == "memory/peak_gib" and predicted is not None:
            of.append(Landmark(f"predicted {predicted:.2f} GiB", y=predicted))
        charts = panels(
            [strand], f"{key}-{place}", share=share, metrics=[metric], marks=of, of=one.name
        )
        title, label = _TITLES[metric]
        found += [
            replace(chart, title=title, y_label=label, alt=f"{title} of {one.name} over training.")
            for chart in charts
        ]
    return found


def noise_chart(one: Run, key: str) -> Chart | None:
    """The critical batch with its interval over training, and the run's batch; None without one."""
    found = [r for r in readings(one) if 0 < r.critical < math.inf]
    if not found:
        return None
    points = [found[i] for i in kept([r.critical for r in found], _NOISE_POINTS)]
    values = [r.critical for r in points]
    bottom, top = min(values) / 8, max(values) * 8
    samples = [r.samples_seen for r in points]
    line = Stroke(
        name="critical batch, S / |G|²",
        x={"samples": samples},
        y=[rounded(v) for v in values],
        low=[rounded(min(max(r.interval.low, bottom), top)) for r in points],
        high=[rounded(min(max(r.interval.high, bottom), top)) for r in points],
    )
    sizes = [(p.samples_seen, p.value) for p in one.history.get("batch/global", ()) if p.value]
    sizes = [sizes[i] for i in kept([value for _, value in sizes], _NOISE_POINTS)]
    batch = Stroke(
        name="global batch of the run",
        x={"samples": [at for at, _ in sizes]},
        y=[value for _, value in sizes],
        color=1,
        style="dash",
    )
    last = found[-1]
    return Chart(
        key=key,
        title="Noise scale",
        alt=f"Critical batch size over training, at the end {last.critical:.0f} "
        f"({last.interval}), beside the run's global batch.",
        x_labels={"samples": AXIS_LABELS["samples"]},
        y_label="samples a batch",
        lines=[line, batch],
        y_kind="log",
        head=["samples seen", "critical batch", "low", "high"],
        rows=[
            [
                f"{r.samples_seen or 0:,}",
                *map(_shown, (r.critical, r.interval.low, r.interval.high)),
            ]
            for r in points[:: max(1, len(points) // 20)]
        ],
        note="The band is Fieller's 95 % interval, cut at eight times the estimates. "
        + " ".join(advice(last, batch_of(one))),
    )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "unbounded"


def facts(one: Run, *, on_cpu: bool) -> list[tuple[str, str]]:
    """Throughput, memory and length of a run, as it wrote them at its end.

    On a CPU the measured peak is that of the whole process, and a plan counts tensors alone, so
    their ratio is given for other devices only.
    """
    summary = one.summary
    rows: list[tuple[str, str]] = []

    def add(title: str, value: Any, text: str) -> None:
        if (number := _number(value)) is not None:
            rows.append((title, text.format(number)))

    add("updates", summary.get("num_updates"), "{:,.0f}")
    add("samples seen", summary.get("samples_seen"), "{:,.0f}")
    add("time", _over(summary.get("seconds"), 60), "{:,.1f} minutes, evaluations included")
    add("throughput", summary.get("samples_per_second"), "{:,.1f} samples a second of training")
    predicted, measured = predicted_gib(one), _number(summary.get("peak_gib"))
    if predicted is None:
        rows.append(("predicted peak memory", "none: no planner chose how this run fits"))
    add("predicted peak memory", predicted, "{:.2f} GiB" + ", of tensors alone" * on_cpu)
    add("measured peak memory", measured, "{:.2f} GiB" + ", of the whole process" * on_cpu)
    add("of it before the first update", summary.get("own_gib"), "{:.2f} GiB")
    if predicted and measured and not on_cpu:
        add("predicted over measured", 100 * (predicted / measured - 1), "{:+.1f} %")
    return rows


def predicted_gib(one: Run) -> float | None:
    """The peak that the planner predicted; None where it chose nothing."""
    return _number(one.config.get("plan/predicted_peak_gib"))


def _over(value: Any, divisor: float) -> float | None:
    number = _number(value)
    return None if number is None else number / divisor


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None


def evaluation(folder: Path | None, room: PictureRoom) -> dict[str, Any] | None:
    """Of a run folder the newest evaluation; None where there is none."""
    return None if folder is None else judged(folder, room)
