"""A range test as a table, in words and as a picture (no torch)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lbaccel.runs.columns import columns
from lbaccel.runs.figures import new_figure, save

if TYPE_CHECKING:  # it imports torch
    from lbaccel.stability.range_test import LrRange

ROWS = 30  # of the table


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours.

    >>> duration(90), duration(600), duration(36000)
    ('90 s', '10 min', '10.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(found: LrRange) -> list[str]:
    """Lines of rate, loss after the step at it, smoothed loss, and what it is called."""
    names = {found.steepest_lr: "steepest"}
    names[found.largest_lr] = "largest" if found.largest_lr not in names else "steepest, largest"
    every = math.ceil(len(found.lrs) / ROWS) if found.lrs else 1
    lines = [("lr", "loss after", "smoothed", ""), ("-", f"{found.start_loss:.4g}", "", "")]
    rows = zip(found.lrs, found.losses, found.smoothed, strict=True)
    for i, (lr, loss, smoothed) in enumerate(rows):
        if i % every == 0 or lr in names or i == len(found.lrs) - 1:
            lines.append((f"{lr:.3g}", f"{loss:.4g}", f"{smoothed:.4g}", names.get(lr, "")))
    return columns(lines, at_least=(8, 10, 10))


def in_words(found: LrRange, *, own_lr: float, base_lr: float) -> list[str]:
    """The result of the test, and the meaning of each rate.

    Every scaling rule is a factor on `base_lr`, so the base for another peak is in proportion.
    """
    ends = {
        "max_lr": "nothing diverged up to the last rate",
        "diverged": f"diverged at {found.diverged_at or 0:.3g}: the loss rose above 4 times its "
        "best",
        "not finite": f"diverged at {found.diverged_at or 0:.3g}: the loss is not finite",
    }
    lines = [ends[found.ended]]
    if found.is_noise:
        return [
            *lines,
            f"the loss fell by {found.fall:.3g}, and its noise from update to update is "
            f"{found.noise:.3g}: no rate can be read off this curve. Try more --num-updates, a "
            "larger --global-batch-size, or a higher --max-lr",
        ]
    if found.steepest_lr is None or found.largest_lr is None or found.suggested_lr is None:
        return [*lines, "the loss never fell: try a lower --min-lr, or more --num-updates"]
    lines.append(f"steepest  {found.steepest_lr:<8.3g} the loss fell most in one update")
    lines.append(
        f"largest   {found.largest_lr:<8.3g} the loss was lowest; above it, training lost ground"
    )
    if found.ended == "max_lr" and found.largest_lr == found.lrs[-1]:
        lines[-1] = (
            f"largest   {found.largest_lr:<8.3g} the loss still fell at the last rate: give a "
            "higher --max-lr"
        )
    lines.append(
        f"suggested {found.suggested_lr:<8.3g} the lower of steepest and a quarter of largest, as "
        f"the peak after a warmup: --base-lr {base_lr * found.suggested_lr / own_lr:.3g}"
    )
    lines.append(
        f"recipe's  {own_lr:<8.3g} {_times(own_lr / found.suggested_lr)} the suggested rate"
        + (", and above the largest" if own_lr > found.largest_lr else "")
    )
    lines.append(
        f"It says what the first {len(found.lrs)} updates from these weights bear, not which rate "
        "ends best: that takes training runs."
    )
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times"


def plot(found: LrRange, path: Path, *, own_lr: float, stable: float | None, title: str) -> None:
    """Draw the loss over the rate, with the rates that matter marked."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    low, high = min(found.lrs, default=own_lr), max(found.lrs, default=own_lr)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, 1.5 * high)
    axes.plot(found.lrs, found.losses, "o", markersize=3, color="0.6", label="loss of the update")
    axes.plot(found.lrs, found.smoothed, color="C0", label="smoothed")
    marks = (
        ("steepest", found.steepest_lr, "C2", "-"),
        ("largest", found.largest_lr, "C1", "-"),
        ("suggested", found.suggested_lr, "C2", "--"),
        ("recipe's own", own_lr, "k", ":"),
        ("stable rate", stable, "C3", "-."),
    )
    for name, lr, color, line in marks:
        if lr is not None and low / 1.5 <= lr <= 1.5 * high:
            axes.axvline(lr, color=color, linestyle=line, label=f"{name} {lr:.3g}")
    low = min((found.start_loss, *found.losses))
    high = min(max((found.start_loss, *found.losses)), found.start_loss + abs(found.start_loss))
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("learning rate of the step before")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
