"""Candidates that real micro-batches measure: for a model that can't be traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lbaccel.errors import RunFailed
from lbaccel.planning.candidates import Candidate, Estimate
from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.cost.update import MakeBatch
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.measure import measure
from lbaccel.planning.plan import Plan
from lbaccel.update.accumulation import LossFn
from lbaccel.update.memory.budget import default_budget

TOO_MUCH = 2**60  # bytes of a candidate that does not fit on this machine at all


def observer(
    estimator: Estimator,
    model: nn.Module,
    make_batch: MakeBatch,
    *,
    loss_fn: LossFn,
    optimizer: str,
    clip_grad_norm: bool,
) -> Callable[[Candidate, int], Estimate]:
    """The function that `Estimator` calls instead of a trace: two real updates of a candidate.

    Nothing of `model` changes. On a CPU, where nothing stops a process that takes too much, a size
    is left out that by the line through a smaller one exceeds what is free.

    Args:
        estimator: of contract, device, and the bytes that do not depend on the candidate.
        model: with weights, on any device.
        make_batch: number of samples -> a micro-batch with values.
        loss_fn: as for `LargeBatch.update`.
        optimizer: a name of timm's.
        clip_grad_norm: whether the gradient is clipped.
    """
    fixed = {
        "weights": estimator.weight_bytes,
        "gradients": estimator.gradient_bytes,
        "optimizer": estimator.state_bytes,
        **({"teacher": estimator.teacher_bytes} if estimator.teacher_bytes else {}),
    }
    held = sum(fixed.values())
    per_sample: dict[str, float] = {}  # of each way of recompute

    def observe(candidate: Candidate, steps: int) -> Estimate:
        size, how = candidate.micro_batch_size, candidate.checkpointing
        policy = how if isinstance(how, str) else "segments"
        if estimator.device.kind == "cpu":
            free = default_budget(torch.device("cpu"))
            if held + per_sample.get(policy, 0.0) * size > free:
                return _estimate(fixed, TOO_MUCH, 0, 0.0, 0.0)
        try:
            found = measure(
                _asked(estimator, candidate, steps, optimizer),
                model,
                make_batch,
                loss_fn=loss_fn,
                optimizer=optimizer,
                clip_grad_norm=1.0 if clip_grad_norm else None,
            )
        except RunFailed:
            return _estimate(fixed, TOO_MUCH, 0, 0.0, 0.0)
        peak = int((found.peak_reserved_gib or found.peak_allocated_gib) * GIB)
        per_sample[policy] = max(per_sample.get(policy, 0.0), (peak - held) / size)
        micro, commit = found.seconds_per_micro_step, found.commit_seconds
        return _estimate(fixed, peak, estimator.device.context, micro, commit)

    return observe


def _asked(estimator: Estimator, candidate: Candidate, steps: int, optimizer: str) -> Plan:
    """A plan of the candidate, as far as a measurement reads it."""
    size, how = candidate.micro_batch_size, candidate.checkpointing
    return Plan(
        model="",
        device=estimator.device,
        budget_gib=math.inf,
        fits=True,
        batch=replace(
            estimator.plan, micro_batch_size=size, world_size=1, global_batch_size=steps * size
        ),
        activation_checkpointing=how if isinstance(how, str) else "segments",
        segments=() if isinstance(how, str) else how,
        units=0,
        memory_format=candidate.memory_format,
        precision=estimator.precision,
        optimizer=optimizer,
        fused_optimizer=estimator.steps_fused,
        lr=0.0,
        predicted_peak_gib=0.0,
        predicted_seconds_per_update=0.0,
        breakdown={},
    )


def _estimate(
    fixed: dict[str, int], peak: int, context: int, micro: float, commit: float
) -> Estimate:
    activations = max(0, peak - sum(fixed.values()))
    parts = {"activations": activations, "workspace": 0, "allocator": 0, "context": context}
    breakdown = {**fixed, **parts}
    return Estimate(
        peak=sum(breakdown.values()),
        traced=peak,
        breakdown=breakdown,
        accumulating=fixed | {"activations": activations, "workspace": 0},
        first_step_seconds=micro,
        micro_step_seconds=micro,
        commit_seconds=commit,
        chain=None,
        forward_seconds=(),
    )
