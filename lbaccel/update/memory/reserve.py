"""Room for the optimizer's state, held from before the first update until its first step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def state_like(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """The state that the optimizer's first step will allocate: pairs (parameter, meta tensor).

    Found by a step of a copy whose parameters lie on the meta device: no memory, no kernel, and
    the optimizer itself stays untouched. Empty where its state exists already, or where its step
    can't run on meta tensors.
    """
    if optimizer.state:
        return []
    memo: dict[int, Any] = {}
    originals: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            shadow = torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            shadow.grad = torch.empty_like(shadow) if p.requires_grad else None
            memo[id(p)], originals[id(shadow)] = shadow, p
    try:
        twin = type(optimizer).__new__(type(optimizer))
        twin.__dict__ = {
            key: copy.deepcopy(value, memo)
            for key, value in optimizer.__dict__.items()
            if "hook" not in key and not callable(value)  # a scheduler wraps `step`
        }
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            twin.__dict__[hooks] = {}
        for group in twin.param_groups:
            group.update({key: False for key in ("fused", "foreach", "capturable") if key in group})
        with torch.no_grad():
            type(optimizer).step(twin)
    except Exception:  # an optimizer that reads its gradients on the host, say: no reservation
        return []
    return [
        (originals[id(p)], value)
        for p, state in twin.state.items()
        if isinstance(state, dict)
        for value in state.values()
        if isinstance(value, Tensor) and value.is_meta
    ]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's state, or meta tensors like what its first step will make.

    Counters of steps are left out.
    """
    if not optimizer.state:
        return [state for _, state in state_like(optimizer)]
    states = (s for s in optimizer.state.values() if isinstance(s, dict))
    values = (value for state in states for value in state.values())
    return [value for value in values if isinstance(value, Tensor) and value.ndim > 0]


class Reservation:
    """Memory of the size of the optimizer's state, so that activations can't take it first."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.held: list[Tensor] = [
            torch.empty_like(state, device=parameter.device)
            for parameter, state in state_like(optimizer)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.held)

    def free(self) -> None:
        """Give the room to the optimizer, right before its step."""
        self.held = []
