"""Pictures: where a figure is made, where one may be written, and the three of a run (no torch)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lbaccel.errors import InputError
from lbaccel.launch import drop_foreign_plot_backend
from lbaccel.runs.folder import PLOTS, atomic_write_bytes
from lbaccel.runs.outputs import Own, ends_of, writable
from lbaccel.runs.read import load_run_folder
from lbaccel.text import in_figure

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.figure import Figure

PANELS = (
    ("loss.png", "cross-entropy", ("train/loss", "val/loss", "val/loss_ema")),
    ("top1.png", "validation top-1 (%)", ("val/top1", "val/top1_ema")),
    ("lr.png", "learning rate", ("optim/lr",)),
)


# of the formats that can say who made them: how a file begins, and how lbaccel's mark stands in it
_MARKS = {
    "png": (b"\x89PNG", b"Software\0lbaccel"),
    "svg": (b"<?xml", b">lbaccel<"),
    "pdf": (b"%PDF", b"/Creator (lbaccel)"),
    "ps": (b"%!PS", b"%%Creator: lbaccel"),
    "eps": (b"%!PS", b"%%Creator: lbaccel"),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a window and without pyplot's state."""
    drop_foreign_plot_backend()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure, at 120 pixels an inch, in the format that the name ends in.

    The file appears whole, and names lbaccel as its maker, by which `check_plot` knows it again.

    Raises:
        OSError: see `writable`, which says so before the work.
    """
    form, content = path.suffix.removeprefix("."), io.BytesIO()
    metadata = {"Software" if form == "png" else "Creator": "lbaccel"} if form in _MARKS else None
    figure.savefig(content, format=form, dpi=120, metadata=metadata)
    atomic_write_bytes(path, content.getvalue())


def _is_figure(path: Path) -> bool:
    magic, mark = _MARKS.get(path.suffix.removeprefix("."), (b"", None))
    head, tail = ends_of(path)
    return mark is not None and head.startswith(magic) and (mark in head or mark in tail)


FIGURE = Own("figure of lbaccel", _is_figure)


def drawable(path: Path, flag: str = "--plot") -> Path:
    """The path, where the name ends in a format that can be drawn; see `writable` for the place.

    Raises:
        InputError: another ending.
    """
    drop_foreign_plot_backend()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix.removeprefix(".") not in FigureCanvasAgg.filetypes:
        raise InputError(
            f"{flag} {path}: draw to one of .png, .svg, .pdf; "
            f"lbaccel cannot draw a {path.suffix!r} file."
        )
    return path


def check_plot(path: Path | None, *, parents: bool = False) -> None:
    """Stop, before the work, where `--plot` could not be drawn or written; None is no plot.

    Raises:
        InputError: see `drawable` and `writable`.
    """
    if path is not None:
        writable(drawable(path), "--plot", parents=parents, own=FIGURE)


def plot_run(folder: Path) -> list[Path]:
    """Draw `plots/loss.png`, `top1.png` and `lr.png` of a run folder; absent metrics are left out.

    Returns:
        The files written.
    """
    run = load_run_folder(folder)
    written: list[Path] = []
    for file, label, metrics in PANELS:
        present = [metric for metric in metrics if run.history.get(metric)]
        if not present:
            continue
        figure = new_figure(6, 4)
        axes = figure.add_subplot()
        for metric in present:
            points = [
                (p.samples_seen, p.value)
                for p in run.history[metric]
                if p.samples_seen is not None and p.value is not None
            ]
            axes.plot(
                [samples for samples, _ in points],
                [value for _, value in points],
                label=metric,
                marker="o" if len(points) < 60 else None,
                markersize=3,
            )
        axes.set_xlabel("samples seen")
        axes.set_ylabel(label)
        axes.set_title(in_figure(run.name), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / PLOTS / file
        path.parent.mkdir(exist_ok=True)
        save(figure, path)
        written.append(path)
    return written
