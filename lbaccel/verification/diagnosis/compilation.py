"""Whether a plan that differs through torch.compile differs without it as well."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from lbaccel.verification.certificate import Diagnosis, error_text
from lbaccel.verification.diagnosis.diagnosis import diagnose
from lbaccel.verification.diagnosis.evidence import Trial
from lbaccel.verification.updates import Result, Subject

COMPILE = "torch.compile"


def diagnose_compiled(
    subject: Subject,
    truth: Result,
    trials: Sequence[Trial],
    tolerance: float,
    again: Callable[[Subject, Trial], Trial],
) -> tuple[Diagnosis, ...]:
    """The causes of what differs in `trials`, which ran through torch.compile.

    Args:
        subject: what is verified.
        truth: the reference update, in plain torch.
        trials: all plans, tried.
        tolerance: of relative errors.
        again: runs the plan of a trial once more.
    """
    wrong = [t for t in trials if t.failed or (t.difference and not t.difference.within(tolerance))]
    if not wrong:
        return ()
    plain = replace(subject, compiled=False)
    without = [again(plain, trial) for trial in wrong]
    found = diagnose(plain, truth, without, tolerance)
    if found:
        return found
    first = wrong[0]
    shown = first.failed or f"differs by {error_text(_largest(first))}"
    evidence = (
        f"with it the first of {len(wrong)} plans {shown}; without it they agree with the whole "
        f"batch (to {error_text(max(map(_largest, without)))})"
    )
    return (Diagnosis("the network", COMPILE, evidence, _advice()),)


def _largest(trial: Trial) -> float:
    d = trial.difference
    return 0.0 if d is None else max(d.loss, d.gradients, d.buffers)


def _advice() -> str:
    budget = importlib.import_module("torch._functorch.config").activation_memory_budget
    if budget < 1:
        return (
            f"torch._functorch.config.activation_memory_budget is {budget:g}: below 1, torch "
            "recomputes random draws of its own in the backward pass, with other values. Leave it "
            "at 1, and recompute by lbaccel: apply_activation_checkpointing(model)."
        )
    return "Leave --compile out for this network, and please report it with the output of --json."
