"""A contract as a table, and as YAML that `lbaccel train --config` takes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import yaml

from lbaccel.network_arguments import as_words
from lbaccel.replication.contract import Contract
from lbaccel.replication.many_gpus import Translation
from lbaccel.runs.columns import columns

WIDTH = 100
SHOULD_BE_SAID = (
    "model",
    "base_lr",
    "epochs",
    "schedule",
    "optimizer",
    "weight_decay",
    "precision",
)
LONGEST = 34  # of a cell before it is wrapped


def table(contract: Contract) -> Iterator[str]:
    """Source setting, contract value, why; then what is not carried over, unknown and assumed."""
    yield f"lbaccel replicate: {contract.origin}"
    yield ""
    rows = [(row.source, _value(row), row.why) for row in contract.rows]
    head = ("source", "contract", "why")
    widths = [min(LONGEST, max(len(row[i]) for row in [head, *rows])) for i in (0, 1)]
    last = WIDTH - sum(widths) - 4
    before, grid = "", []
    for source, value, why in (head, *rows):
        row = ("" if source == before else source, value, why)
        before = source
        cells = [textwrap.wrap(c, w) or [""] for c, w in zip(row, (*widths, last), strict=True)]
        grid += zip_longest(*cells, fillvalue="")
    yield from columns(grid, at_least=widths)
    notes = list(remarks(contract))
    if notes:
        yield ""
    for note in notes:
        yield from textwrap.wrap(note, WIDTH, subsequent_indent="  ")


def remarks(contract: Contract) -> Iterator[str]:
    """A sentence for everything that the YAML does not say."""
    yield from map(str, contract.gaps)
    for key in contract.unknown:
        yield f"unknown key, not read: {key}"
    if contract.assumed:
        yield f"not in the source, its script's defaults: {', '.join(contract.assumed)}"
    left = [name for name in SHOULD_BE_SAID if name not in contract.settings]
    if left:
        yield f"not in the source, left at lbaccel train's defaults: {', '.join(left)}"
    if "data" not in contract.settings:
        yield "data: the source names none; give --data folder:PATH (without it: the digits)"


def to_yaml(contract: Contract) -> str:
    """The contract's settings, with the reason of each, and all remarks, as comments."""
    lines = [f"# The contract of: {contract.origin}", "# Run it: lbaccel train --config FILE", ""]
    settings = contract.settings
    for row in contract.rows:
        if row.setting in settings:
            lines += _commented(f"{row.source}: {row.why}")
            style = None if isinstance(row.value, (list, dict)) else False
            dumped = yaml.safe_dump({row.setting: row.value}, default_flow_style=style, width=90)
            lines.append(dumped.rstrip("\n"))
    lines.append("")
    for remark in remarks(contract):
        lines += _commented(remark)
    return "\n".join(lines) + "\n"


def _commented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ")


def _value(row: Translation) -> str:
    if row.setting is None:
        return "-"
    value = row.value
    if value is None:
        return f"{row.setting}: none"
    if isinstance(value, list) and len(value) > 6:
        first, last = (", ".join(f"{v:g}" for v in part) for part in (value[:3], value[-1:]))
        return f"{row.setting}: {first}, ... {last} ({len(value)})"
    return f"{row.setting}: {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return " ".join(as_words(value))
    return str(value)
