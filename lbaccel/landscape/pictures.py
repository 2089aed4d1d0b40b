"""The figures of a landscape as Li et al. 2018 draw them: curve, contours, relief."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lbaccel.landscape.folder import CONTOURS, CURVE, RELIEF
from lbaccel.landscape.result import Landscape
from lbaccel.runs.figures import new_figure, save
from lbaccel.text import in_figure

LEVELS = 20  # of contours
WIDE = 50.0  # from this ratio of the largest to the smallest loss on, an axis is logarithmic
FACTORS = 10.0  # from this one on, contours are equal factors apart
LOSS, SHARE = "#1f5fa8", "#c43c1c"


def draw(result: Landscape, folder: Path) -> list[Path]:
    """A curve with loss and accuracy, or contours and relief of the loss; returns the files.

    Points whose loss is not finite are left out.
    """
    if result.y is None:
        _draw_curve(result, folder / CURVE)
        return [folder / CURVE]
    _draw_contours(result, folder / CONTOURS)
    _draw_relief(result, folder / RELIEF)
    return [folder / CONTOURS, folder / RELIEF]


def _numbers(values: Any) -> Any:
    return np.array(values, dtype=np.float64)  # None becomes nan


def _draw_curve(result: Landscape, path: Path) -> None:
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    x = result.x.values
    (loss,) = axes.plot(x, _numbers(result.loss), color=LOSS, label="loss")
    values = _numbers(result.loss)
    low, high = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=0.0)
    if low > 0 and high / low > WIDE:
        axes.set_yscale("log")
    axes.set_xlabel(_x_label(result))
    axes.set_ylabel("cross-entropy", color=LOSS)
    axes.tick_params(axis="y", labelcolor=LOSS, which="both")
    axes.grid(alpha=0.3)
    beside = axes.twinx()
    (share,) = beside.plot(x, _numbers(result.top1_pct), color=SHARE, ls="--", label="accuracy")
    beside.set_ylabel("top-1 (%)", color=SHARE)
    beside.set_ylim(0, 105)
    beside.tick_params(axis="y", labelcolor=SHARE)
    axes.legend(handles=[loss, share], loc="best", fontsize=8)
    axes.set_title(_title(result), fontsize=9)
    save(figure, path)


def _draw_contours(result: Landscape, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    assert result.y is not None
    figure = new_figure(6.0, 5.2)
    axes = figure.add_subplot()
    loss = np.ma.masked_invalid(_numbers(result.loss))
    if loss.count() and loss.min() < loss.max():
        wide = loss.min() > 0 and loss.max() / loss.min() > FACTORS
        levels: Any = (
            np.geomspace(loss.min(), loss.max(), LEVELS)
            if wide
            else MaxNLocator(LEVELS).tick_values(loss.min(), loss.max())
        )
        lines = axes.contour(result.x.values, result.y.values, loss, levels=levels, cmap="viridis")
        axes.clabel(lines, fontsize=7, fmt="%.3g")
    axes.plot(0, 0, marker="+", color="black", markersize=8)
    axes.set_xlabel(_x_label(result))
    axes.set_ylabel("second random direction" if result.content["second"] is None else "random y")
    axes.set_title(_title(result), fontsize=9)
    save(figure, path)


def _draw_relief(result: Landscape, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    assert result.y is not None
    figure = new_figure(6.4, 5.2)
    axes: Any = figure.add_subplot(projection="3d")
    loss = _numbers(result.loss)
    low, high = np.nanmin(loss, initial=np.inf), np.nanmax(loss, initial=0.0)
    wide = low > 0 and high / low > WIDE
    x, y = np.meshgrid(result.x.values, result.y.values)
    axes.plot_surface(
        x, y, np.log10(loss) if wide else loss, cmap="viridis", linewidth=0, antialiased=False
    )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.set_zlabel("log10 of cross-entropy" if wide else "cross-entropy")
    axes.set_title(_title(result), fontsize=9)
    save(figure, path)


def _x_label(result: Landscape) -> str:
    if result.content["second"] is not None:
        return "x: first model at 0, second at 1"
    return f"random direction, normalised by {result.content['norm']}"


def _title(result: Landscape) -> str:
    content = result.content
    data, model = content["data"], content["weights"]["model"]
    return in_figure(
        f"{model}, {data['num_samples']:,} images ({data['split']}), direction "
        f"{content['direction']}"
    )
