"""The output of a run in a terminal: a bar or plain lines, peak memory, and the closing table."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lbaccel.launch import keeps_all_output
from lbaccel.runs.length import Length
from lbaccel.runs.pace import Pace, clock_time
from lbaccel.text import printable


class Progress:
    """A bar on a terminal, plain lines elsewhere; silent on all ranks but the first.

    A notebook and a continuous integration keep every state of a bar, so they get lines too, which
    are seldom (`Pace.is_due`).
    """

    def __init__(
        self,
        length: Length,
        is_main_process: bool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.length, self.is_main_process = length, is_main_process
        self.pace = Pace(length, clock=clock)
        self.bar: Any = None
        if is_main_process and sys.stderr.isatty() and not keeps_all_output():
            from tqdm import tqdm

            # its own time left counts updates, and those before a resume
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.bar = tqdm(total=length.stop_at, dynamic_ncols=True, bar_format=form)

    def show(self, update: int, metrics: dict[str, Any]) -> None:
        """Say where the run stands after `update`."""
        shown = {
            "epoch": f"{metrics['epoch']:.1f}",
        }
        for name, key, spec in (("loss", "train/loss", ".4f"), ("lr", "optim/lr", ".4g")):
            if key in metrics:  # not before the first line of a sparse log
                shown[name] = format(metrics[key], spec)
        if "val/top1" in metrics:
            shown["val/top1"] = f"{metrics['val/top1']:.2f}"
        total, place = self.length.stop_at, self.pace.after_update(update)
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(update - self.bar.n)
            left = place.seconds_left
            self.bar.set_postfix({**({} if left is None else {"left": clock_time(left)}), **shown})
        elif self.is_main_process and self.pace.is_due(update):
            if "perf/samples_per_second" in metrics:
                shown["samples/s"] = f"{metrics['perf/samples_per_second']:,.0f}"
                shown["peak"] = _gib(metrics["memory/peak_gib"])
            line = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"update {update}/{total}, {place}  {line}", flush=True)

    def note(self, text: str) -> None:
        """Print a line that is not part of the progress."""
        if self.is_main_process:
            print(printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def peak_gib() -> float:
    """Peak memory: of the CUDA allocator, or of this process where there is no GPU.

    nan where the platform does not tell (Windows has no `resource`): null in the run's files.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * (1 if sys.platform == "darwin" else 1024) / 2**30


def resident_gib() -> float:
    """Memory that this process holds now, Python and torch included; nan where nobody says.

    On a GPU it is nan too: `peak_gib` is the allocator's there, and nothing of the host.
    """
    if torch.cuda.is_available():
        return math.nan
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError):
        return math.nan


def closing_table(summary: Mapping[str, Any]) -> str:
    """The run's result as aligned lines."""
    rows = [
        ("validation top-1", _percent(summary.get("val_top1"))),
        ("best validation top-1", f"{_percent(summary['best_val_top1'])} "
         f"(update {summary['best_update']})"),
        ("train loss", f"{summary.get('train_loss', math.nan):.4f}"),
        ("updates", f"{summary['num_updates']:,}"),
        ("samples", f"{summary['samples_seen']:,}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        ("samples a second in updates", f"{summary['samples_per_second']:,.0f}"),
        ("peak memory", _gib(summary["peak_gib"]) + _own(summary.get("own_gib"))),
    ]  # fmt: skip
    if "val_top1_ema" in summary:
        rows.insert(1, ("validation top-1, EMA", _percent(summary["val_top1_ema"])))
    if "best_val_top1_ema" in summary:
        best = f"{_percent(summary['best_val_top1_ema'])} (update {summary['best_update_ema']})"
        rows.insert(3, ("best validation top-1, EMA", best))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _own(value: float | None) -> str:
    """
    >>> _own(0.61), _own(None)
    (', 0.61 of it before the first update', '')
    """
    known = value is not None and not math.isnan(value)
    return f", {value:.2f} of it before the first update" if known else ""


def _gib(value: float | None) -> str:
    """
    >>> _gib(1.5), _gib(math.nan), _gib(None)
    ('1.50 GiB', '-', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:.2f} GiB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
