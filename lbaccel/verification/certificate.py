"""The certificate of `verify`: a cell for each plan, a diagnosis for each cause; table and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lbaccel.batch.plan import NormBatchSize
from lbaccel.runs.columns import columns

Verdict = Literal["pass", "fail", "not run"]
WIDTH = 100


@dataclass(frozen=True)
class Cell:
    """One update under one plan, against the reference."""

    partition: str  # samples of each micro-batch, the ranks in brackets
    ranks: int
    checkpointing: bool
    verdict: Verdict
    loss_error: float | None = None  # relative; None where it was not run, or is not a number
    gradient_error: float | None = None  # of the whole gradient vector
    buffer_error: float | None = None  # the largest of any module's buffers
    random_state_kept: bool | None = None  # torch's, numpy's and Python's, after the update
    reason: str = ""  # why it failed or was not run


@dataclass(frozen=True)
class Diagnosis:
    """A cause of what differs, where it is, and what to type."""

    layer: str
    cause: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Certificate:
    """Whether an update of this model is the same under every plan; `print` shows a table."""

    model: str
    data: str
    num_samples: int
    norm_batch_size: NormBatchSize
    num_batch_norm_layers: int
    reference: str
    checkpointing: str
    tolerance: float
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    findings: tuple[Diagnosis, ...]
    compiled: bool = False  # the plans ran through torch.compile, the reference did not

    @property
    def equivalent(self) -> bool:
        """No plan that ran differs, and at least one ran."""
        verdicts = {cell.verdict for cell in self.cells}
        return "fail" not in verdicts and "pass" in verdicts

    @property
    def largest_relative_error(self) -> float | None:
        """Of losses, gradients and buffers of all cells; None where none is a number."""
        errors = [
            error
            for cell in self.cells
            for error in (cell.loss_error, cell.gradient_error, cell.buffer_error)
            if error is not None
        ]
        return max(errors, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, with `equivalent` and `largest_relative_error`."""
        found = asdict(self)
        for key in ("cells", "findings"):
            found[key] = list(found[key])
        return found | {
            "equivalent": self.equivalent,
            "largest_relative_error": self.largest_relative_error,
        }

    def to_json(self) -> str:
        """`as_dict` as strict JSON: no NaN, no Infinity."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *_table(self.cells), "", *self._foot()])

    def _head(self) -> list[str]:
        n, count = self.norm_batch_size, self.num_batch_norm_layers
        how = {None: "as they are", "frozen": "frozen", "global": "over all samples"}.get(
            n, f"over {n} samples"
        )
        norm = f"{count} BatchNorm layers {how}" if count else "no BatchNorm layer"
        if not count and isinstance(n, int):
            norm += f", cut by {n} samples all the same"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        through = "; through torch.compile" if self.compiled else ""
        lines = [
            f"lbaccel verify: {self.model}, {self.data}; {norm}",
            f"reference: {self.reference}",
            f"{self.checkpointing}{through}",
            f"float64 on the CPU, tolerance {self.tolerance:g}; {versions}",
        ]
        return [part for x in lines for part in textwrap.wrap(x, WIDTH, subsequent_indent="  ")]

    def _foot(self) -> list[str]:
        lines = []
        for finding in self.findings:
            text = f"{finding.cause}, at {finding.layer}: {finding.evidence}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
            lines += textwrap.wrap(
                finding.advice, WIDTH, initial_indent="  -> ", subsequent_indent="     "
            )
        lines += [""] * bool(lines)
        for reason in dict.fromkeys(c.reason for c in self.cells if c.verdict == "not run"):
            lines += textwrap.wrap(f"not run: {reason}", WIDTH, subsequent_indent="  ")
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        count = {v: sum(c.verdict == v for c in self.cells) for v in ("pass", "fail", "not run")}
        total = len(self.cells)
        if count["fail"]:
            return f"NOT EQUIVALENT: {count['fail']} of {total} plans give another update."
        if not count["pass"]:
            return f"NOT EQUIVALENT: none of the {total} plans could run, so nothing is shown."
        worst = f"largest relative error {error_text(self.largest_relative_error)}"
        if count["not run"]:
            return (
                f"EQUIVALENT for the {count['pass']} of {total} plans that ran ({worst}); "
                f"{count['not run']} not run."
            )
        return f"EQUIVALENT: all {total} plans give the update of the whole batch ({worst})."


def partition_text(shares: Sequence[Sequence[int]]) -> str:
    """The micro-batches of each rank, in samples.

    >>> partition_text([[4, 4, 3]]), partition_text([[1] * 11]), partition_text([[4, 2], [5]])
    ('4 + 4 + 3', '11 x 1', '(4 + 2) | (5)')
    """
    texts: list[str] = []
    for sizes in shares:
        same = len(set(sizes)) == 1 and len(sizes) > 3
        texts.append(f"{len(sizes)} x {sizes[0]}" if same else " + ".join(map(str, sizes)))
    return texts[0] if len(texts) == 1 else " | ".join(f"({text})" for text in texts)


def number_or_none(value: float) -> float | None:
    """NaN and infinity have no place in JSON."""
    return value if math.isfinite(value) else None


def error_text(value: float | None) -> str:
    """A relative error in the table."""
    return "-" if value is None else ("0" if value == 0 else f"{value:.1e}")


def _table(cells: Sequence[Cell]) -> list[str]:
    rows = [
        ["micro-batches", "ranks", "recompute", "loss", "gradient", "buffers", "random", "verdict"]
    ]
    for cell in cells:
        kept = {None: "-", True: "kept", False: "moved"}[cell.random_state_kept]
        errors = (cell.loss_error, cell.gradient_error, cell.buffer_error)
        recompute = "yes" if cell.checkpointing else "no"
        verdict = cell.verdict if cell.verdict == "pass" else cell.verdict.upper()
        row = [cell.partition, str(cell.ranks), recompute, *map(error_text, errors), kept, verdict]
        rows.append(row)
    lines = columns(rows)
    for at, cell in reversed(list(enumerate(cells, 1))):
        if cell.reason and cell.verdict == "fail":
            lines[at + 1 : at + 1] = textwrap.wrap(
                cell.reason, WIDTH, initial_indent="    ", subsequent_indent="    "
            )
    return lines
