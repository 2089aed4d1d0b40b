"""Parameter groups with learning rates of their own, and their scaling as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer

from lbaccel.errors import InputError, check_number
from lbaccel.optim.scaling import rule_named, scale_lr

SCALED_TO = "lr_batch_size"  # the batch that a group's learning rate belongs to
APPLIED = "lr_scale_applied"
LAST_BLOCKS = 5
THREE_GROUPS = (1.0, 0.6, 0.4)  # classifier, last blocks, rest


def scale_optimizer(
    optimizer: Optimizer,
    *,
    base_batch_size: int,
    global_batch_size: int,
    rule: str = "linear",
    exponent: float | None = None,
) -> Optimizer:
    """Scale the learning rate of every group by one factor, once.

    With f = `scale_lr(1, ...)`: `lr = lr * f` in each group, so that a head at 10 times the rate
    and layer decay keep their ratios. The batch a group was scaled to is written in it and goes
    with `state_dict`: scaling again to the same batch, or after a resume, does nothing; to
    another, it goes on from the batch that it stands at. Scale before a scheduler is built.

    Returns:
        The optimizer, changed in place.

    Raises:
        InputError: see `scale_lr`; a learning-rate scheduler is there already.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 2.1.

    >>> import torch
    >>> head, body = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> groups = [{"params": [body]}, {"params": [head], "lr": 1.0}]
    >>> optimizer = torch.optim.SGD(groups, lr=0.1)
    >>> for _ in range(2):
    ...     _ = scale_optimizer(optimizer, base_batch_size=256, global_batch_size=512)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.2, 2.0]
    """
    sizes = {"global_batch_size": global_batch_size, "rule": rule, "exponent": exponent}
    factors: list[float] = []
    for group in optimizer.param_groups:
        stands_at = group.get(SCALED_TO, base_batch_size)
        scale_lr(1.0, base_batch_size=base_batch_size, **sizes)  # a bad argument is always refused
        if stands_at != global_batch_size and "initial_lr" in group:
            raise InputError(
                "this optimizer has a learning-rate scheduler, which would put its own rate back. "
                "Call scale_optimizer before the scheduler is built."
            )
        factor = rule_named(rule).scaled(
            1.0,
            base_batch_size=stands_at,
            global_batch_size=global_batch_size,
            exponent=exponent,
        )
        factors.append(1.0 if stands_at == global_batch_size else factor)
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = group["lr"] * factor  # not in place: groups may share one tensor
        group[SCALED_TO] = global_batch_size
    return optimizer


def apply_lr_scale(optimizer: Optimizer) -> Optimizer:
    """Multiply each group's rate by its `lr_scale`, once: timm writes it and leaves it to timm's
    own schedulers.

    >>> import torch
    >>> group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}
    >>> optimizer = apply_lr_scale(apply_lr_scale(torch.optim.SGD([group], lr=0.1)))
    >>> optimizer.param_groups[0]["lr"]
    0.05
    """
    for group in optimizer.param_groups:
        if not group.get(APPLIED):
            group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
            group[APPLIED] = True
    return optimizer


def reference_lr(optimizer: Any) -> float:
    """The present rate of the group whose `lr_scale` is nearest 1: what is logged.

    >>> import torch
    >>> head, body = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> groups = [{"params": [body]}, {"params": [head], "lr_scale": 10.0}]
    >>> reference_lr(apply_lr_scale(torch.optim.SGD(groups, lr=0.1)))
    0.1
    """
    group = min(optimizer.param_groups, key=lambda g: abs(g.get("lr_scale", 1.0) - 1.0))
    return float(group["lr"]) / group.get("lr_scale", 1.0)


def lr_factors(
    model: nn.Module, *, head_lr_scale: float | None = None, lr_groups: str = "none"
) -> dict[int, float]:
    """Learning-rate factor of each parameter that has one other than 1, by `id(parameter)`.

    Args:
        model: of timm, or with `get_classifier()`, and `group_matcher()` for "three".
        head_lr_scale: factor of the classifier's parameters.
        lr_groups: "three" gives the classifier 1, the last five blocks 0.6 and the rest 0.4
            (HaoKang-Timmy, "large_batch_training", 2021, part 3). Blocks are timm's: what belongs
            to the last block (a final norm, a last convolution) is in its group.

    Raises:
        InputError: both, or a model that does not tell its classifier or its blocks.
    """
    if head_lr_scale is None and lr_groups == "none":
        return {}
    if head_lr_scale is not None:
        check_number("head_lr_scale", head_lr_scale)
        if lr_groups != "none":
            raise InputError(
                f"--head-lr-scale {head_lr_scale:g} and --lr-groups {lr_groups} both say the "
                "classifier's learning rate. Leave one out."
            )
    head = _head(model)
    if head_lr_scale is not None:
        return dict.fromkeys(head, head_lr_scale)
    if not hasattr(model, "group_matcher"):
        raise InputError(
            f"--lr-groups three: {type(model).__name__} has no group_matcher() that tells its "
            "blocks. Use --head-lr-scale, or a model of timm."
        )
    matcher: Any = model.group_matcher  # pyright: ignore[reportAttributeAccessIssue]
    layers: Any = group_parameters(model, matcher(coarse=False), reverse=True)
    layer_of = {id(p): layers[name] for name, p in model.named_parameters()}
    body = {key: layer for key, layer in layer_of.items() if key not in head}
    ends = {layer_of[key] for key in head}  # ConvNeXt's last norm stands beside its classifier
    last = {*ends, *sorted(set(body.values()) - ends)[-LAST_BLOCKS:]}
    first, blocks, rest = THREE_GROUPS
    factors = {key: blocks if layer in last else rest for key, layer in body.items()}
    return {**factors, **dict.fromkeys(head, first)}


def split_groups(
    groups: Iterable[dict[str, Any]], factors: dict[int, float]
) -> list[dict[str, Any]]:
    """The groups, cut so that all parameters of one have one factor, multiplied into `lr_scale`."""
    cut: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in parts.items():
            scale = group.get("lr_scale", 1.0) * factor
            cut.append({**group, "params": parameters, "lr_scale": scale})
    return cut


def head_of(model: nn.Module) -> set[int]:
    """The parameters of the classifier that the model names, by `id(parameter)`; may be none."""
    classifier: Any = getattr(model, "get_classifier", lambda: None)
    found = classifier()
    modules = found if isinstance(found, (tuple, list)) else [found]
    return {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}


def _head(model: nn.Module) -> set[int]:
    head = head_of(model)
    if not head:
        raise InputError(
            f"{type(model).__name__} does not tell its classifier (get_classifier() has no "
            "parameters), so it can't have a learning rate of its own. Leave out --head-lr-scale "
            "and --lr-groups."
        )
    return head
