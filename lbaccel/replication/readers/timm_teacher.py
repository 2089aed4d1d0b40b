"""timm's `kd_*` settings: its `LogitDistillationTask`, in terms of the contract.

Semantics were read in timm's `train.py` and `timm/task/distillation.py` of August 2026.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbaccel.recipe.values import shown
from lbaccel.replication.many_gpus import Gap, Translation


def teacher_of(a: Mapping[str, Any]) -> tuple[list[Translation], list[Gap]]:
    """Rows and gaps of a teacher; none without one.

    timm's loss is t CE + d T^2 KL, with the weights t and d of `weights_of`. The contract's weights
    are 1 - alpha and alpha, so alpha = d / (t + d), and the loss is t + d times smaller.

    Args:
        a: the values of the keys, defaults filled in.
    """
    name = a["kd_model_name"]
    if not name:
        return [], []
    said = f"kd_model_name {name}"
    reason = _not_carried(a)
    where = None if reason else _on_the_hub(str(name))
    if where is None:
        why = reason or f"timm has no weights of {name} on the Hugging Face hub"
        return [], [Gap(said, why, "no teacher; --teacher RUN takes a run of lbaccel train")]
    task, soft = weights_of(a)
    alpha = soft / (task + soft)
    weights = ", ".join(
        f"{key} {'unset' if a[key] is None else shown(float(a[key]))}"
        for key in ("task_loss_weight", "distill_loss_weight")
    )
    rows = [
        Translation(said, "teacher", where, "timm's weights of that name, frozen, in evaluation"),
        Translation(weights, "distill_alpha", alpha, f"d / (t + d) of t {task:g} and d {soft:g}"),
        Translation(
            f"kd_temperature {shown(float(a['kd_temperature']))}",
            "distill_temperature",
            float(a["kd_temperature"]),
            "T of both softmaxes, with T^2 before the divergence on both sides",
        ),
    ]
    scale = task + soft
    if math.isclose(scale, 1.0):
        return rows, []
    gap = Gap(
        f"weights of the loss that add up to {scale:g}",
        "lbaccel's are 1 - alpha and alpha",
        f"the same two parts in the same proportion, in a loss {scale:g} times smaller: for SGD "
        f"that is a rate {scale:g} times lower, for Adam and its kin almost nothing",
    )
    return rows, [gap]


def weights_of(a: Mapping[str, Any]) -> tuple[float, float]:
    """timm's weights of the labels' loss and of the teacher's.

    >>> weights_of({"task_loss_weight": 0.3, "distill_loss_weight": None})
    (0.3, 0.7)
    >>> weights_of({"task_loss_weight": None, "distill_loss_weight": None})
    (1.0, 1.0)
    """
    task, soft = a["task_loss_weight"], a["distill_loss_weight"]
    if soft is not None:
        return (1.0 if task is None else float(task)), float(soft)
    return (1.0, 1.0) if task is None else (float(task), 1.0 - float(task))


def _not_carried(a: Mapping[str, Any]) -> str:
    kind, loss = a["kd_distill_type"], a["kd_loss_type"]
    task, soft = weights_of(a)
    if kind != "logit":
        return f"kd_distill_type {kind} compares more than logits"
    if loss != "kl":
        return f"kd_loss_type {loss} is another distance"
    if a["bce_loss"]:
        return "bce_loss true, and lbaccel teaches beside cross-entropy"
    if not (soft > 0 and task >= 0):
        return f"the weights {task:g} of the labels and {soft:g} of the teacher are no proportion"
    return ""


def _on_the_hub(name: str) -> str | None:
    from timm.models import get_pretrained_cfg

    from lbaccel.recipe.exported import HUB

    found = get_pretrained_cfg(name, allow_unregistered=True)
    repo = None if found is None else found.hf_hub_id
    return f"{HUB}{repo}" if repo else None
