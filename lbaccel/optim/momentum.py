"""Momentum that holds the learning rate, corrected where the learning rate changes."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

IN = "momentum_lr"  # the learning rate a group's buffers were built with; saved with the group


def buffer_with_lr(optimizer: Optimizer, group: dict[str, Any]) -> str | None:
    """The key of the state that is a momentum of steps, learning rate included; None without one.

    Of torch's and timm's optimizers two have one (read in their sources, and tested): timm's
    RMSpropTF with `lr_in_momentum`, and its Adafactor with a first moment.
    """
    name = type(optimizer).__name__
    if name == "RMSpropTF" and group.get("lr_in_momentum") and group["momentum"] > 0:
        return "momentum_buffer"
    if name == "Adafactor" and group.get("beta1") is not None:
        return "exp_avg"
    return None


def correct_momentum(optimizer: Optimizer, *, buffer: str | None = None) -> bool:
    """Before each step, multiply momentum that holds the learning rate by `eta_new / eta_old`.

    SGD in the form `v = m v + g`, `w = w - eta v` (torch's) needs no correction: a new eta scales
    the old gradients too. The form `v = m v + eta g`, `w = w - v` keeps the old eta in v; scaling
    v by eta_new / eta_old makes the two forms equal again. A change to or from 0 scales nothing.

    Args:
        optimizer: watched from now on by a hook of torch's; calling this twice corrects once.
        buffer: the key in `optimizer.state[parameter]` of an optimizer of your own in the second
            form; by default the known ones (`buffer_with_lr`).

    Returns:
        Whether there is anything to correct.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 3, remark 2, equations 9 and 10.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> correct_momentum(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    False
    """
    if not any(buffer or buffer_with_lr(optimizer, group) for group in optimizer.param_groups):
        return False

    @torch.no_grad()
    def rescale(watched: Any, *_: object) -> None:
        for group in watched.param_groups:
            key = buffer or buffer_with_lr(watched, group)
            if key is None:
                continue
            lr, before = float(group["lr"]), group.get(IN)
            if before and lr and lr != before:
                for parameter in group["params"]:
                    held = watched.state.get(parameter, {}).get(key)
                    if held is not None:
                        held.mul_(lr / before)
            if lr:
                group[IN] = lr

    optimizer.register_step_pre_hook(rescale)
    return True
