"""The pictures of one run: loss, accuracy and learning rate over the samples seen."""

from __future__ import annotations

from pathlib import Path

from lbaccel.runs.folder import PLOTS
from lbaccel.runs.read import load_run_folder

PANELS = (
    ("loss.png", "cross-entropy", ("train/loss", "val/loss", "val/loss_ema")),
    ("top1.png", "validation top-1 (%)", ("val/top1", "val/top1_ema")),
    ("lr.png", "learning rate", ("optim/lr",)),
)


def plot_run(folder: Path) -> list[Path]:
    """Draw `plots/loss.png`, `top1.png` and `lr.png` of a run folder; absent metrics are left out.

    Returns:
        The files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = load_run_folder(folder)
    written = []
    for file, label, metrics in PANELS:
        present = [metric for metric in metrics if run.history.get(metric)]
        if not present:
            continue
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
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
        axes.set_title(run.name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / PLOTS / file
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
