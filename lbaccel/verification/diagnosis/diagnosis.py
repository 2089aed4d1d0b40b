"""Why an update differs under another plan: the layer, the cause, and what to type."""

from __future__ import annotations

from collections.abc import Sequence

from lbaccel.verification.certificate import Diagnosis
from lbaccel.verification.diagnosis.causes import (
    CAUSES,
    FAILS,
    FLOAT32,
    OF_THE_SECOND,
    TAKE_ANY_NUMBER,
    UNKNOWN,
)
from lbaccel.verification.diagnosis.evidence import Evidence, Trial
from lbaccel.verification.diagnosis.probe import OUTSIDE, ROOT, trace
from lbaccel.verification.updates import Result, Subject


def diagnose(
    subject: Subject, truth: Result, trials: Sequence[Trial], tolerance: float
) -> tuple[Diagnosis, ...]:
    """The causes of all that differs in `trials`; empty where nothing does.

    Args:
        subject: what is verified.
        truth: the reference update.
        trials: all plans, tried.
        tolerance: of relative errors.
    """
    differing = [t for t in trials if t.difference and not t.difference.within(tolerance)]
    failed = [t for t in trials if t.failed]
    if not differing and not failed:
        return ()
    findings: list[Diagnosis] = []
    if differing:
        cut = [t for t in differing if not t.checkpointing and t.num_micro_batches > 1]
        plain = cut[0] if cut else None
        shown = plain or max(differing, key=lambda t: t.num_micro_batches)
        try:
            whole, parts = trace(subject, subject.plan(subject.whole)), trace(subject, shown.plan)
        except Exception as error:  # a probe must not take the certificate away
            return (_unknown(differing, f"and the probe failed: {type(error).__name__}: {error}"),)
        rounded = whole.rounded or parts.rounded
        evidence = Evidence(subject, truth, trials, tolerance, plain, whole, parts, rounded)
        second = all(t.difference is None or t.difference.update == 2 for t in differing)
        for cause in OF_THE_SECOND if second else CAUSES:
            findings += cause(evidence)
        if not findings:
            findings.append(_rounded(rounded) if rounded else _unknown(differing))
    if failed and not findings:
        findings.append(Diagnosis(OUTSIDE, FAILS, failed[0].failed, TAKE_ANY_NUMBER))
    return tuple(findings)


def _rounded(where: str) -> Diagnosis:
    return Diagnosis(
        where,
        FLOAT32,
        "its output is not in float64, so nothing can be shown to more than its own digits",
        "Cast to the dtype of the input in place of float32 (x.to(weight.dtype)), or compare to "
        "float32's digits: tolerance=1e-5 (--tolerance 1e-5).",
    )


def _unknown(differing: Sequence[Trial], more: str = "and no known cause was seen") -> Diagnosis:
    worst = [t.difference for t in differing if t.difference is not None]
    named = [p.name for d in worst for p in d.parameters] + [
        b for d in worst for b in d.buffer_names
    ]
    return Diagnosis(
        named[0] if named else ROOT,
        UNKNOWN,
        f"the update differs {more}",
        "Look at the first cell that fails; and please report it, with the output of --json.",
    )
