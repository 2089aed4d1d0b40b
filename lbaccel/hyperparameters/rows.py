"""The sheet as values: a row a hyper-parameter, and what `lbaccel train --config` takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

Value = float | int | str | tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One item: its value at both batches, the rule, who published it, how sure the field is."""

    item: str
    old: Value
    new: Value
    rule: str
    source: str
    sure: str


@dataclass(frozen=True)
class Sheet:
    """The result of `transfer`: old and new values, with the rule of each.

    Attributes:
        base_batch_size: the batch of the old values.
        global_batch_size: the batch of the new ones.
        lr: the new peak learning rate.
        rows: the items, learning rate first.
        warnings: where a rule can't be followed, or a figure is out of its range.
        settings: keys of `lbaccel train --config`, without those that were not given.
    """

    base_batch_size: int
    global_batch_size: int
    lr: float
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def k(self) -> float:
        """`global_batch_size / base_batch_size`."""
        return self.global_batch_size / self.base_batch_size

    def row(self, item: str) -> Row:
        """The row of an item; KeyError where the sheet has none."""
        for row in self.rows:
            if row.item == item:
                return row
        raise KeyError(item)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "k": self.k}


def shown(value: Value) -> str:
    """A value in text: six digits, tuples with commas.

    >>> shown((0.9, 0.968)), shown(0.1 * 3), shown(5)
    ('0.9, 0.968', '0.3', '5')
    """
    if isinstance(value, tuple):
        return ", ".join(shown(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return f"{value}"
