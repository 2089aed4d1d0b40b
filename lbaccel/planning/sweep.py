"""The frontier of time against memory: what each budget would buy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lbaccel.planning.candidates import MemoryFormat
from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.search import Search
from lbaccel.runs.figures import new_figure, save

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the activations that recompute leaves


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a sweep, on the line through the traces of two micro-batches."""

    micro_batch_size: int
    activations_kept: float  # share; 1 recomputes nothing
    peak_gib: float
    seconds_per_update: float
    chosen: bool = False
    best: bool = False  # no other point has less of both


def sweep(
    search: Search, layout: MemoryFormat, chosen: SweepPoint | None = None
) -> list[SweepPoint]:
    """Plans of every size of the ladder, with and without recompute, in order of their peak."""
    found = [] if chosen is None else [chosen]
    for size in search.sizes():
        for share in SHARES:
            costs = search.lines.predicted(layout, size, share)
            if costs is not None:
                peak, seconds = costs
                found.append(SweepPoint(size, share, peak / GIB, seconds))
    found.sort(key=lambda point: (point.peak_gib, point.seconds_per_update))
    points: list[SweepPoint] = []
    fastest = float("inf")
    for point in found:
        best = point.seconds_per_update < fastest
        fastest = min(fastest, point.seconds_per_update)
        points.append(replace(point, best=best))
    return points


def plot(points: list[SweepPoint], path: Path, *, title: str, budget_gib: float) -> None:
    """Draw the sweep to `path`."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for share in SHARES:
        some = [p for p in points if p.activations_kept == share and not p.chosen]
        label = "no recompute" if share == 1.0 else f"recompute to {share:.0%} of the activations"
        axes.plot(
            [p.peak_gib for p in some],
            [p.seconds_per_update for p in some],
            "o",
            markersize=4,
            label=label,
        )
    frontier = [p for p in points if p.best]
    axes.step(
        [p.peak_gib for p in frontier],
        [p.seconds_per_update for p in frontier],
        where="post",
        color="0.5",
        linewidth=1,
        label="frontier",
        zorder=0,
    )
    for point in points:
        if point.chosen:
            axes.plot(
                point.peak_gib,
                point.seconds_per_update,
                "*",
                color="black",
                markersize=14,
                label=f"the plan: micro-batch {point.micro_batch_size}",
            )
    axes.axvline(budget_gib, color="0.3", linestyle="--", linewidth=1, label="budget")
    axes.set_xscale("log")
    axes.set_xlabel("predicted peak (GiB)")
    axes.set_ylabel("predicted seconds an update")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save(figure, path)
