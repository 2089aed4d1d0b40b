"""The report of `verify --against ddp`: a row for each comparison; as a table and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lbaccel.batch.plan import NormBatchSize
from lbaccel.runs.columns import columns
from lbaccel.verification.certificate import WIDTH, error_text


@dataclass(frozen=True)
class Comparison:
    """One quantity of DDP's, and what it is in lbaccel."""

    what: str
    ddp: str
    lbaccel: str
    verdict: Literal["pass", "fail"]
    error: float | None  # relative; None where there is none
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class DdpCertificate:
    """Whether one process of lbaccel does the update of W GPUs; `print` shows a table."""

    model: str
    data: str
    gpus: int
    accumulation: int
    per_gpu_batch: int
    num_samples: int
    sync_bn: bool
    uneven: bool
    norm_batch_size: NormBatchSize
    momenta: tuple[float, ...]
    num_batch_norm_layers: int
    tolerance: float
    versions: dict[str, str]
    comparisons: tuple[Comparison, ...]

    @property
    def equivalent(self) -> bool:
        """All that was compared is the same."""
        return all(row.verdict == "pass" for row in self.comparisons)

    @property
    def largest_relative_error(self) -> float | None:
        """Of all comparisons; None where none is a number."""
        return max((r.error for r in self.comparisons if r.error is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, with `equivalent` and `largest_relative_error`."""
        found = asdict(self) | {"comparisons": [asdict(row) for row in self.comparisons]}
        return found | {
            "momenta": list(self.momenta),
            "equivalent": self.equivalent,
            "largest_relative_error": self.largest_relative_error,
        }

    def to_json(self) -> str:
        """`as_dict` as strict JSON: no NaN, no Infinity."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._notes(), self._verdict()])

    def _head(self) -> Iterator[str]:
        k = self.accumulation
        each = f"{k} micro-batches of {self.per_gpu_batch}" if k > 1 else f"{self.per_gpu_batch}"
        short = ", the last one half as many" if self.uneven else ""
        own = "synchronised by all-reduces (torch's SyncBatchNorm needs CUDA)"
        norm = own if self.sync_bn else "each rank's own"
        n = self.norm_batch_size
        ghost = "" if n is None else f", norm_batch_size {n}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        for line in (
            f"lbaccel verify --against ddp: {self.model}, {self.data}",
            f"DDP: {self.gpus} gloo rank{'s' * (self.gpus > 1)} x {each} samples{short}, mean "
            "loss, default averaging; "
            + (f"BatchNorm {norm}" if self.num_batch_norm_layers else "no BatchNorm layer"),
            f"lbaccel: one process, global batch {self.num_samples}{ghost}",
            f"float64 on the CPU, tolerance {self.tolerance:g}; {versions}",
        ):
            yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ")

    def _table(self) -> Iterator[str]:
        rows = [("", "DDP", "lbaccel", "error", "verdict")]
        for row in self.comparisons:
            verdict = row.verdict if row.verdict == "pass" else row.verdict.upper()
            rows.append((row.what, row.ddp, row.lbaccel, error_text(row.error), verdict))
        for at, line in enumerate(columns(rows)):
            yield line
            if at and self.comparisons[at - 1].reason:
                reason = self.comparisons[at - 1].reason
                yield from textwrap.wrap(
                    reason, WIDTH, initial_indent="    ", subsequent_indent="    "
                )

    def _notes(self) -> Iterator[str]:
        notes: list[str] = []
        if self.uneven:
            notes.append(
                "DDP weighs its ranks equally, (1 / W) sum_r g_r, lbaccel the samples, "
                "sum_r (n_r / N) g_r: they differ where the ranks' batches do."
            )
        if self.num_batch_norm_layers and not self.sync_bn and self.gpus > 1:
            notes += self._statistics()
        for note in notes:
            yield from textwrap.wrap(note, WIDTH, subsequent_indent="  ")
        if notes:
            yield ""

    def _statistics(self) -> list[str]:
        w, k = self.gpus, self.accumulation
        notes = [
            "Running statistics: DDP goes on with rank 0's, lbaccel with those of every ghost "
            "batch in order; lbaccel has no policy of rank 0 alone. R_r of DDP's ranks give "
            "lbaccel's: c^W r0 + sum_r c^(W-1-r) (R_r - c r0), c = (1 - m)^K."
        ]
        if len(self.momenta) == 1:
            (m,) = self.momenta
            ours = 1 - (1 - m) ** (1 / w)
            notes.append(
                f"An update leaves the old statistics {(1 - m) ** k:.4g} of their weight under "
                f"DDP, {(1 - m) ** (w * k):.4g} here; with --bn-momentum {ours:.6g} = "
                f"1 - (1 - {m:g})^(1/{w}), what lbaccel replicate writes, "
                f"{(1 - ours) ** (w * k):.4g} here too."
            )
        return notes

    def _verdict(self) -> str:
        failed = sum(row.verdict == "fail" for row in self.comparisons)
        total = len(self.comparisons)
        if failed:
            return f"NOT EQUIVALENT: {failed} of {total} comparisons differ."
        worst = error_text(self.largest_relative_error)
        return (
            f"EQUIVALENT: one process does the update of {self.gpus} "
            f"GPU{'s' * (self.gpus > 1)} (largest relative error {worst})."
        )
