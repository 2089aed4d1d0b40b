"""The contract and the arguments that a plan is asked for, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.errors import InputError, brief, check_whole
from lbaccel.network_arguments import network_arguments
from lbaccel.update.accumulation import LossFn
from lbaccel.update.embeddings import Embed, check_embed
from lbaccel.update.normalization import has_batch_norm

NORM_BATCH_SIZE = 32
MOST_SAMPLES = 10**8  # of an update: a plan walks through its micro-batches one by one


def batch_plan(
    model: nn.Module,
    *,
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
    norm_batch_size: NormBatchSize,
    mix_pairs: bool,
) -> BatchPlan:
    """The contract, with one group of samples as micro-batch where none is asked for."""
    _check_size(global_batch_size)
    if norm_batch_size is None and has_batch_norm(model):
        norm_batch_size = min(NORM_BATCH_SIZE, global_batch_size)
    unit = norm_batch_size if isinstance(norm_batch_size, int) else 2 if mix_pairs else 1
    return BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size or unit,
        world_size=world_size,
        norm_batch_size=norm_batch_size,
        mix_pairs=mix_pairs,
    )


def _check_size(global_batch_size: int) -> None:
    check_whole("global_batch_size", global_batch_size)
    if global_batch_size > MOST_SAMPLES:
        raise InputError(
            f"global_batch_size={brief(global_batch_size)} is above {MOST_SAMPLES:,}, the most "
            "that a plan walks through in micro-batches. Use a smaller one."
        )


def model_arguments(
    model: str | nn.Module, model_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The arguments of a network given by name, checked."""
    if model_kwargs and not isinstance(model, str):
        raise InputError(
            "model_kwargs= are arguments of a model by name, and this one is built already. Leave "
            "them out."
        )
    return network_arguments(model_kwargs or {}, where="model_kwargs")


def check_pairs(embed: Embed | None, loss_fn: LossFn | None, teacher: nn.Module | None) -> None:
    """Raise InputError for a loss that compares samples without what it needs."""
    if embed is None:
        return
    check_embed(embed)
    if loss_fn is None or teacher is not None:
        raise InputError(
            "embed= makes the rows of a loss on the whole batch, so it needs loss_fn=(model, rows) "
            "-> loss, and no teacher=. Give plan(..., embed=embed, loss_fn=loss_fn)."
        )


def check_teacher(
    teacher: nn.Module | None, loss_fn: LossFn | None, num_classes: int | None
) -> None:
    """Raise InputError for a teacher beside a loss, or one that answers for other classes."""
    if teacher is None:
        return
    if loss_fn is not None:
        raise InputError(
            "teacher= with loss_fn=: with a teacher the loss is that of distillation. Call the "
            "teacher in loss_fn, or leave loss_fn out."
        )
    outputs = getattr(teacher, "num_classes", num_classes)
    if num_classes is not None and outputs != num_classes:
        raise InputError(
            f"the teacher has {outputs} outputs and the network {num_classes}: both answer for the "
            f"same classes. Use num_classes={outputs} (--num-classes {outputs})."
        )
