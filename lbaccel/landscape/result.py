"""A landscape as it is returned: its axes, its surface, and all that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbaccel.landscape.axes import Axis
from lbaccel.landscape.folder import MADE_BY, Points


@dataclass(frozen=True, eq=False)
class Landscape:
    """Loss and accuracy on a line or a plane through trained weights.

    Args:
        x: the axis; x = 0 is the (first) model, and x = 1 the second one.
        y: a second axis, or None.
        points: place, row by row with x first, to mean cross-entropy (None: not finite) and top-1
            in %.
        content: all that `landscape.json` says but the surface.
        folder: where the files lie; None where none were written.
    """

    x: Axis
    y: Axis | None
    points: Points
    content: Mapping[str, Any]
    folder: Path | None = None

    @property
    def loss(self) -> list[Any]:
        """Of shape `[x.num]`, or `[y.num][x.num]`; None is not finite."""
        return self._rows(0)

    @property
    def top1_pct(self) -> list[Any]:
        """The same for the right predictions in %."""
        return self._rows(1)

    def _rows(self, k: int) -> list[Any]:
        width = self.x.num
        flat = [self.points[i][k] for i in range(len(self.points))]
        rows = [flat[i : i + width] for i in range(0, len(flat), width)]
        return rows[0] if self.y is None else rows

    def as_json(self) -> dict[str, Any]:
        """The content of `landscape.json`; `landscape.folder.write_surface` says what it is."""
        surface = {"loss": self.loss, "top1_pct": self.top1_pct}
        return {"made_by": MADE_BY, "complete": True, **self.content, **surface}
