"""The evidence for causes: plans that were tried, and traces of the whole and of a cut batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lbaccel.batch.plan import BatchPlan
from lbaccel.verification.diagnosis.probe import ProbeTrace
from lbaccel.verification.differences import Difference
from lbaccel.verification.updates import Result, Subject

ROWS_TOLERANCE = 1e-9  # of outputs: far above rounding in float64, far below any real cause
ROUNDED_TOLERANCE = 1e-3  # where part of the network computes in float32 or less


@dataclass(frozen=True)
class Trial:
    """One plan that was tried."""

    plan: BatchPlan
    checkpointing: bool
    difference: Difference | None = None  # None where it was not run, or failed
    buffers: dict[str, Tensor] | None = None  # of plans of one rank
    failed: str = ""
    not_run: str = ""

    @property
    def num_micro_batches(self) -> int:
        """Over all ranks, without fillers."""
        ranks = range(self.plan.world_size)
        return sum(not m.is_filler for rank in ranks for m in self.plan.partition(rank))


@dataclass(frozen=True)
class Evidence:
    """The evidence for the causes: traces of the whole batch and of a cut one."""

    subject: Subject
    truth: Result
    trials: Sequence[Trial]
    tolerance: float
    plain: Trial | None  # a plan that cuts the batch, differs, and recomputes nothing
    whole: ProbeTrace
    parts: ProbeTrace
    rounded: str | None  # the first module, or the loss, that computes in less than float64

    @property
    def rows_tolerance(self) -> float:
        """Of outputs, relative."""
        return ROUNDED_TOLERANCE if self.rounded else ROWS_TOLERANCE

    def unequal(self) -> Iterator[str]:
        """Modules of other outputs for the same inputs, in order of completion."""
        for key, rows in self.parts.outputs.items():
            if key in self.whole.outputs and self._differ(rows, self.whole.outputs[key]):
                theirs = self.whole.inputs[key]
                if not self._differ(self.parts.inputs[key], theirs):
                    yield key[0]

    def outputs_agree(self) -> bool:
        """No row of a module's output differs."""
        return not any(
            self._differ(rows, self.whole.outputs[key])
            for key, rows in self.parts.outputs.items()
            if key in self.whole.outputs
        )

    def inputs_differ(self) -> bool:
        """The network got other rows."""
        return self._differ(self.parts.first, self.whole.first)

    def only_rounding(self) -> bool:
        """Something computes in float32, and no more is off than that explains."""
        d = self.plain.difference if self.plain else None
        return d is not None and bool(self.rounded) and d.gradients < ROUNDED_TOLERANCE

    def losses_agree(self) -> bool:
        """The weighted mean over micro-batches is the loss of the whole batch."""
        gap = abs(self.parts.loss - self.whole.loss)
        return gap <= self.rows_tolerance * abs(self.whole.loss)

    def _differ(self, a: Any, b: Any) -> bool:
        return a.compare(b, self.rows_tolerance) is False
