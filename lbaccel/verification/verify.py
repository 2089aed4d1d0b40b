"""`verify`: is an update of this model the same, however it is cut?"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel import __version__
from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.errors import InputError, check_number, check_seed
from lbaccel.update.accumulation import LossFn
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.embeddings import Embed, coupled
from lbaccel.verification.certificate import (
    Cell,
    Certificate,
    Diagnosis,
    number_or_none,
    partition_text,
)
from lbaccel.verification.copies import (
    aside,
    described,
    float64_batch,
    float64_copy,
    loss_in_float64,
    unwrapped,
)
from lbaccel.verification.diagnosis.compilation import diagnose_compiled
from lbaccel.verification.diagnosis.diagnosis import diagnose
from lbaccel.verification.diagnosis.evidence import Trial
from lbaccel.verification.differences import difference
from lbaccel.verification.ranks import run_ranks, why_no_ranks
from lbaccel.verification.reference import reference
from lbaccel.verification.updates import (
    Result,
    Subject,
    check_ranks,
    converted,
    learned,
    planned,
    watched,
)

RANKS = 2


def verify(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    embed: Embed | None = None,
    norm_batch_size: NormBatchSize = None,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-12,
    averages: Sequence[str] = (),
    compile: bool = False,
    name: str | None = None,
    data: str | None = None,
    say: Callable[[str], object] | None = None,
) -> Certificate:
    """Run two updates of a copy of `model` whole and cut in several ways, and compare them.

    The copy runs in float64 on the CPU: whole, in equal, ragged and single micro-batches, and on
    two ranks (forked processes), each with and without activation checkpointing. With g the
    gradient of the whole batch in plain torch and h that of a plan, the plan passes where

        |h - g| / |g| <= tolerance

    and the same holds of the loss, of the buffers of each module, and of all other tensors that a
    forward moves: frozen parameters, plain attributes, the loss function's own. Then all follow
    g for a step, and a second update is compared, from what the first one left. The random states
    of torch, numpy and Python are as before. `verify` traces each difference to a layer and a
    cause. Model, gradients, buffers and random states of the caller stay as they are.

    Args:
        model: the network, not prepared by Accelerate. Without `norm_batch_size` it is taken as it
            is, its BatchNorm layers included.
        loss_fn: (model, micro-batch) -> mean loss, or (mean loss, weight), as for
            `LargeBatch.update`; with `embed`, (model, rows of the whole batch) -> mean loss.
        batch: tuple, list, dict or tensor; every tensor has the samples in dimension 0.
        embed: of a loss that compares samples, as for `LargeBatch.update`.
        norm_batch_size: samples of a BatchNorm statistic, "global" or "frozen": as in the plan.
        blocks: names of modules to recompute, as for `apply_activation_checkpointing`.
        seed: of dropout's masks.
        tolerance: largest relative error.
        averages: running averages that a forward moves, as for `LargeBatch`.
        compile: run the plans through torch.compile, and the whole batch in plain torch as ever.
            Two forked ranks can't compile, so they are not run.
        name: of the model, in the certificate.
        data: what the samples are, in the certificate.
        say: called with a line before each update, such as `print`.

    Returns:
        The `Certificate`; `print` shows it as a table, `equivalent` is the verdict.

    Raises:
        InputError: what can't be verified: a loss function that fails on the whole batch, tensors
            of different lengths, fewer samples than `norm_batch_size`.
        RunFailed: the loss of the whole batch is not finite.

    >>> import torch
    >>> from lbaccel import verify
    >>> def loss_fn(model, micro_batch):
    ...     x, y = micro_batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> batch = torch.randn(7, 3), torch.randn(7, 1)
    >>> verify(torch.nn.Linear(3, 1), loss_fn, batch).equivalent
    True
    >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    >>> verify(net, loss_fn, batch).findings[0].cause
    'BatchNorm over the micro-batch'
    >>> verify(net, loss_fn, batch, norm_batch_size=3).equivalent
    True
    """
    check_number("tolerance", tolerance, at_most=1.0)
    seed = check_seed("seed", seed)
    model = unwrapped(model)
    loss_fn = loss_fn if embed is None else coupled(loss_fn, embed)
    with aside(model), loss_in_float64(loss_fn) as reset:
        in_float64, num_samples = float64_batch(batch)
        twin = float64_copy(model)
        names = None if blocks is None else tuple(blocks)
        subject = Subject(
            *(twin, loss_fn, in_float64, num_samples, norm_batch_size, seed, names),
            averages=tuple(averages),
            reset=reset,
            compiled=compile,
        )
        subject.plan(subject.whole)  # stops at a norm_batch_size that the samples do not hold
        converted(float64_copy(twin), norm_batch_size)
        subject = learned(subject)
        say = say or (lambda _: None)
        say(f"the whole batch of {num_samples} samples in plain torch")
        start = time.monotonic()
        subject = replace(subject, watched=watched(subject))
        truth = reference(subject)
        patience = 120 + 60 * (time.monotonic() - start)
        how, cannot_recompute = _recompute(subject)
        trials = []
        for plan in plans(subject):
            for checkpointing in (False, True):
                say(_text(plan) + (", recomputed" if checkpointing else ""))
                if checkpointing and cannot_recompute:
                    trials.append(Trial(plan, True, not_run=cannot_recompute))
                else:
                    trials.append(_try(subject, plan, checkpointing, truth, tolerance, patience))
        if plans(subject)[-1].world_size == 1:
            reason = f"two ranks need {RANKS} x {subject.unit} samples, and there are {num_samples}"
            trials += [Trial(plans(subject)[0], c, not_run=reason) for c in (False, True)]
        findings = _findings(subject, truth, trials, tolerance, patience)
    return Certificate(
        model=name or type(model).__name__,
        data=data or f"{num_samples} samples",
        num_samples=num_samples,
        norm_batch_size=norm_batch_size,
        num_batch_norm_layers=sum(isinstance(m, _BatchNorm) for m in twin.modules()),
        reference=_reference_text(norm_batch_size, coupled=embed is not None),
        compiled=compile,
        checkpointing=how,
        tolerance=tolerance,
        versions=_versions(),
        cells=tuple(_cell(t, tolerance) for t in trials),
        findings=findings,
    )


def _versions() -> dict[str, str]:
    found = {"lbaccel": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return found | {"python": platform.python_version()}


def _findings(
    subject: Subject, truth: Result, trials: list[Trial], tolerance: float, patience: float
) -> tuple[Diagnosis, ...]:
    if not subject.compiled:
        return diagnose(subject, truth, trials, tolerance)

    def again(subject: Subject, trial: Trial) -> Trial:
        return _try(subject, trial.plan, trial.checkpointing, truth, tolerance, patience)

    return diagnose_compiled(subject, truth, trials, tolerance, again)


def plans(subject: Subject) -> list[BatchPlan]:
    """Whole, equal, ragged, in single units, and on two ranks, as far as there are units."""
    count = subject.plan(subject.whole).num_groups(subject.num_samples)
    found = [subject.plan(size * subject.unit) for size in _sizes(count)]
    if subject.num_samples >= RANKS * subject.unit:
        found.append(subject.plan(-(-count // 4) * subject.unit, RANKS))
    return found


def _sizes(count: int) -> list[int]:
    """Units of a micro-batch: all, a half or another equal part, a ragged cut, one.

    >>> _sizes(11), _sizes(12), _sizes(3), _sizes(1)
    ([11, 6, 4, 1], [12, 6, 5, 1], [3, 2, 1], [1])
    """
    equal = next((count // k for k in range(2, count) if count % k == 0), -(-count // 2))
    ragged = next((s for s in range(-(-count // 3), count) if count % s), equal)
    return sorted({count, equal, ragged, 1}, reverse=True)


def _recompute(subject: Subject) -> tuple[str, str]:
    """How activation checkpointing is applied, and why it can't be."""
    try:
        return str(apply_activation_checkpointing(float64_copy(subject.model), subject.blocks)), ""
    except InputError as error:
        if subject.blocks is not None:
            raise
        return "activation checkpointing: not possible", str(error)


def _try(
    subject: Subject,
    plan: BatchPlan,
    checkpointing: bool,
    truth: Result,
    tolerance: float,
    patience: float,
) -> Trial:
    if plan.world_size > 1:
        return _try_ranks(subject, plan, checkpointing, truth, tolerance, patience)
    try:
        result = planned(subject, plan, checkpointing=checkpointing, follow=truth.gradients)
    except InputError as error:
        return Trial(plan, checkpointing, not_run=str(error))
    except Exception as error:
        return Trial(plan, checkpointing, failed=described(error))
    found = difference(result, truth, tolerance)
    shown = result.after if found.update == 2 else result
    assert shown is not None
    return Trial(plan, checkpointing, found, shown.buffers)


def _try_ranks(
    subject: Subject,
    plan: BatchPlan,
    checkpointing: bool,
    truth: Result,
    tolerance: float,
    patience: float,
) -> Trial:
    reason = why_no_ranks()
    if subject.compiled:
        reason = "two ranks are forked processes, in which torch.compile can't run"
    if reason is not None:
        return Trial(plan, checkpointing, not_run=reason)

    def update(rank: int) -> Any:
        check_ranks(plan, rank)
        result = planned(
            subject, plan, rank=rank, checkpointing=checkpointing, follow=truth.gradients
        )
        return difference(result, truth, tolerance)

    reports = run_ranks(update, world_size=RANKS, timeout_seconds=patience)
    kinds = [kind for kind, _ in reports]
    if "no start" in kinds:
        return Trial(plan, checkpointing, not_run=reports[kinds.index("no start")][1])
    if "error" in kinds:
        errors = [said for kind, said in reports if kind == "error"]
        # The rank that failed says why; the other only that it did.
        (kind, text) = min(errors, key=lambda said: said[0] == "RunFailed")
        refused = {"not_run": text.partition(": ")[2]} if kind == "InputError" else {"failed": text}
        return Trial(plan, checkpointing, **refused)
    found = [value for _, value in reports]
    worst = next((d for d in found if not d.within(tolerance)), found[0])
    return Trial(plan, checkpointing, worst)


def _cell(trial: Trial, tolerance: float) -> Cell:
    verdict, reason = "pass", ""
    d = trial.difference
    if trial.not_run:
        verdict, reason = "not run", trial.not_run
    elif d is None:
        verdict, reason = "fail", trial.failed
    elif not d.within(tolerance):
        verdict = "fail"
        reason = "" if d.loss == d.loss else "the loss is not finite"
    return Cell(
        partition=_text(trial.plan),
        ranks=trial.plan.world_size,
        checkpointing=trial.checkpointing,
        verdict=verdict,
        loss_error=None if d is None else number_or_none(d.loss),
        gradient_error=None if d is None else number_or_none(d.gradients),
        buffer_error=None if d is None else number_or_none(d.buffers),
        random_state_kept=None if d is None else d.random_state_kept,
        reason=reason,
    )


def _text(plan: BatchPlan) -> str:
    ranks = range(plan.world_size)
    shares = [[m.num_samples for m in plan.partition(r) if not m.is_filler] for r in ranks]
    return partition_text(shares)


def _reference_text(norm_batch_size: NormBatchSize, *, coupled: bool) -> str:
    text = "plain torch, one forward and one backward of the whole batch"
    if coupled:
        text += ", whose rows the loss compares"
    if norm_batch_size == "frozen":
        return f"{text}; BatchNorm by its running statistics"
    if norm_batch_size == "global":
        return f"{text}; BatchNorm over all of it"
    if norm_batch_size is not None:
        return f"{text}; each BatchNorm layer takes its ghost batches one after the other"
    return text
