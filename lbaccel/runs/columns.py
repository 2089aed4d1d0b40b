"""Aligned tables of text: the one place that pads a cell (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lbaccel.text import in_markdown, printable


def columns(
    rows: Iterable[Sequence[str]], align: str = "l", *, at_least: Sequence[int] = ()
) -> list[str]:
    """One line a row, cells two spaces apart and each as wide as the widest of its column.

    Args:
        rows: all of one length; a heading is the first of them.
        align: "l" or "r" for each column; the last letter holds for all columns that follow.
        at_least: widths below which a column is not cut.

    >>> for line in columns([("model", "updates"), ("resnet50", "90")], "lr"):
    ...     print(line)
    model     updates
    resnet50       90
    """
    grid = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for i, least in enumerate(at_least[: len(widths)]):
        widths[i] = max(widths[i], least)
    sides = align + align[-1] * len(widths)
    pads = [str.ljust if side == "l" else str.rjust for side in sides[: len(widths)]]
    return [
        "  ".join(
            pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)
        ).rstrip()
        for row in grid
    ]


def markdown_columns(rows: Iterable[Sequence[str]]) -> str:
    """The same as a table of Markdown: the first column to the left, all others to the right.

    >>> print(markdown_columns([("model", "updates"), ("a|b", "90")]))
    | model | updates |
    | --- | ---: |
    | a\\|b | 90 |
    """
    grid = [[in_markdown(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(grid[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [grid[0], rule, *grid[1:]])
