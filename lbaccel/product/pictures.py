"""Pictures of an evaluation: the confusion matrix, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lbaccel.data.images import ImageArray
from lbaccel.launch import drop_foreign_plot_backend
from lbaccel.product.evaluation import Evaluation
from lbaccel.runs.figures import new_figure, save
from lbaccel.text import in_figure, one_line

MOST_CLASSES = 60  # of a matrix that can be read
MOST_NUMBERS = 20  # classes of a matrix with a number in each cell
MOST_PAIRS = 30
COLUMNS, ROWS = 6, 4  # of the sheet
THUMBNAIL = 224  # pixels a side
LONGEST = 24  # characters of a name


def draw_confusion(result: Evaluation, path: Path) -> None:
    """The confusion matrix; with more than 60 classes the pairs that are confused most."""
    names = result.trained.classes
    if len(names) > MOST_CLASSES:
        _draw_pairs(result, path)
        return
    size, counts = len(names), result.figures.matrix(len(names))
    side = max(4.0, min(16.0, 2.5 + 0.45 * size if size <= MOST_NUMBERS else 4 + 0.2 * size))
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    of_class = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(of_class, 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    labels = drawn(names)
    small = 9 if size <= MOST_NUMBERS else 6
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    turned: dict[str, Any] = slanted if size <= MOST_NUMBERS else {"rotation": 90}
    axes.set_xticks(range(size), labels, fontsize=small, **turned)
    axes.set_yticks(range(size), labels, fontsize=small)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class of the image")
    axes.set_title(f"top-1 {result.top1_pct:.2f} % of {result.figures.n:,} images", fontsize=10)
    figure.colorbar(image, ax=axes, label="% of the images of the class", fraction=0.045)
    if size <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = shares[row, column] > 55
                axes.text(
                    *(column, row, f"{count:,}"),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    save(figure, path)


def _draw_pairs(result: Evaluation, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    names, pairs = result.trained.classes, result.figures.confusion
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    worst = wrong[np.argsort(-wrong[:, 2], kind="stable")[:MOST_PAIRS]].tolist()
    figure = new_figure(9, 1.5 + 0.24 * max(1, len(worst)))
    axes = figure.add_subplot()
    axes.barh(range(len(worst)), [count for _, _, count in worst], color="tab:blue")
    left, right = drawn(names[i] for i, _, _ in worst), drawn(names[j] for _, j, _ in worst)
    labels = [f"{a} as {b}" for a, b in zip(left, right, strict=True)]
    axes.set_yticks(range(len(worst)), labels, fontsize=8)
    axes.set_ylim(max(1, len(worst)) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("images of the first class that are predicted as the second")
    axes.set_title(
        f"top-1 {result.top1_pct:.2f} % of {result.figures.n:,} images; of {len(names):,} classes "
        "the pairs that are confused most",
        fontsize=10,
    )
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_mistakes(result: Evaluation, path: Path) -> bool:
    """A sheet of the most confident mistakes; False where there is no mistake to draw."""
    rows = _most_confident(result)
    if not rows:
        return False
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(max(4.2, 2.1 * columns), 2.55 * lines + 0.4)
    figure.suptitle(_heading(result, len(rows)), fontsize=10)
    for place in range(lines * columns):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.set_axis_off()
        if place >= len(rows):
            continue
        row = rows[place]
        axes.imshow(_thumbnail(result, row), interpolation="nearest")
        predicted = int(result.outputs.predicted[row])
        said = result.probabilities[row, predicted]
        is_one, name = drawn([result.trained.classes[i] for i in _pair(result, row)])
        file = drawn([result.judged.names[row].rpartition("/")[2]])[0]
        axes.set_title(
            f"is {is_one}\npredicted {name}\n{100 * said:.1f} %   {file}", fontsize=7, loc="left"
        )
    save(figure, path)
    return True


def _heading(result: Evaluation, shown: int) -> str:
    wrong = result.figures.n - result.figures.num_right
    if shown < wrong:
        return f"the {shown} most confident of {wrong:,} mistakes"
    return f"all {wrong:,} mistakes, the most confident first" if wrong > 1 else "the only mistake"


def _pair(result: Evaluation, row: int) -> tuple[int, int]:
    return int(result.judged.labels[row]), int(result.outputs.predicted[row])


def _most_confident(result: Evaluation) -> list[int]:
    wrong = np.flatnonzero(result.outputs.predicted != result.judged.labels)
    confidence = result.probabilities[wrong, result.outputs.predicted[wrong]]
    order = np.argsort(-confidence, kind="stable")[: COLUMNS * ROWS]
    return [int(row) for row in wrong[order]]


def _thumbnail(result: Evaluation, row: int) -> NDArray[np.uint8]:
    """The image, cut to a square of 224 pixels, as [H, W, 3]."""
    images = result.judged.images
    if isinstance(images, ImageArray):
        pixels = images.images[row].permute(1, 2, 0).numpy()
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    image: Any = images.load(row)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, box=square))


def drawn(names: Iterable[str]) -> list[str]:
    """Names as labels: on one line, cut in the middle where long, without a formula of matplotlib.

    A character that the font has no picture of is written as its code: matplotlib would draw an
    empty box for it, and warn.
    """
    shown = []
    for name in names:
        text = one_line(name)
        text = "".join(c if _has_picture(c) else c.encode("unicode_escape").decode() for c in text)
        if len(text) > LONGEST:
            half = LONGEST // 2
            text = f"{text[: half - 1]}…{text[-half:]}"
        shown.append(in_figure(text))
    return shown


@lru_cache(maxsize=4096)
def _has_picture(char: str) -> bool:
    drop_foreign_plot_backend()
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return font.get_char_index(ord(char)) != 0
