"""The optimizer's state, whole and as one process has it: torch's numbering, plain tensors.

So a checkpoint resumes into another stage and another world size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class OptimizerState(Protocol):
    """The part of an optimizer that a checkpoint keeps; a sharded one's methods are collectives."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers have it in one process."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that any sharding has saved."""
        ...


Groups = list[list[nn.Parameter]]
"""The parameters of each group of the user's optimizer, in order, before it was prepared."""


def parameters_of(optimizer: torch.optim.Optimizer) -> Groups:
    """See `Groups`; DeepSpeed takes groups without parameters out, and so does this."""
    groups = (list(group["params"]) for group in optimizer.param_groups)
    return [group for group in groups if group]


def _numbered(groups: Groups) -> Iterator[tuple[int, int, nn.Parameter]]:
    """(number in the state_dict, number of the group, parameter) of each."""
    number = 0
    for index, group in enumerate(groups):
        for parameter in group:
            yield number, index, parameter
            number += 1


def _settings(optimizer: torch.optim.Optimizer, groups: Groups) -> list[dict[str, Any]]:
    numbers = [[n for n, g, _ in _numbered(groups) if g == index] for index in range(len(groups))]
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": own}
        for group, own in zip(optimizer.param_groups, numbers, strict=True)
    ]


def _take_settings(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})


def keep_layouts(optimizer: torch.optim.Optimizer) -> None:
    """From now on a state that is loaded takes the strides of its parameter.

    torch's fused kernels go through parameter, gradient and state by their memory, not by their
    indices (2.15, SGD and Adam on a CPU). `load_state_dict` keeps the strides of what was saved: a
    state from a run with another memory format would be added to other elements, in silence.
    """
    if not any(getattr(hook, "keeps_layouts", False) for hook in _load_hooks(optimizer)):
        optimizer.register_load_state_dict_post_hook(_LayOut())


def _load_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(getattr(optimizer, "_optimizer_load_state_dict_post_hooks", {}).values())


class _LayOut:
    keeps_layouts = True

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    continue
                if value.stride() != parameter.stride():
                    laid_out = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                    state[key] = laid_out.copy_(value)


class DTensorState:
    """Of an optimizer over DTensors (FSDP2). Both methods are collectives."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._groups = optimizer, parameters_of(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the CPU."""
        state = {
            number: {
                key: value.full_tensor().cpu()
                if isinstance(value, DTensor)
                else copy.deepcopy(value)
                for key, value in self._optimizer.state[p].items()
            }
            for number, _, p in _numbered(self._groups)
            if p in self._optimizer.state
        }
        return {"state": state, "param_groups": _settings(self._optimizer, self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each rank takes its shard."""
        _take_settings(self._optimizer, state["param_groups"])
        self._optimizer.state.clear()
        for number, _, p in _numbered(self._groups):
            if number in state["state"]:
                self._optimizer.state[p] = {
                    key: _like(p, value) for key, value in state["state"][number].items()
                }


def _like(parameter: nn.Parameter, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return copy.deepcopy(value)
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    on_device = value.to(parameter.to_local().device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)


class ZeroState:
    """Of an optimizer under DeepSpeed ZeRO. Both methods are collectives.

    DeepSpeed keeps one flat vector a group (ZeRO-1, 2) or a sub-group (ZeRO-3), a part on each
    rank; `safe_get_full_optimizer_state` and `safe_set_local_optimizer_state` know where a
    parameter lies in it.

    Args:
        engine: the prepared model.
        groups: of the optimizer from before it was prepared.
    """

    def __init__(self, engine: Any, groups: Groups) -> None:
        self._engine, self._groups = engine, groups

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the CPU."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        if self._engine.optimizer is inner:  # ZeRO-0
            return inner.state_dict()
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Any]] = {}
        self._link()
        for number, index, p in _numbered(self._groups):
            flat = self._flat(index, p) if p.requires_grad else None
            if flat is None or flat not in inner.state:
                continue
            entry: dict[str, Any] = {}
            for key, value in inner.state[flat].items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    whole: Any = safe_get_full_optimizer_state(p, key)
                    entry[key] = whole.view(_shape(p)).cpu()
                else:  # each parameter counts its own steps
                    entry[key] = copy.deepcopy(value)
            state[number] = entry
        return {"state": state, "param_groups": _settings(inner, self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each rank takes its part."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        if self._engine.optimizer is inner:
            inner.load_state_dict(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        _take_settings(inner, state["param_groups"])
        inner.state.clear()
        mine = [
            (self._flat(index, p), p, state["state"][number])
            for number, index, p in _numbered(self._groups)
            if number in state["state"] and p.requires_grad
        ]
        for flat, p, entry in mine:
            for key, value in entry.items():
                whole = isinstance(value, Tensor) and value.shape == _shape(p)
                made = inner.state[flat]
                if key not in made:
                    made[key] = torch.zeros_like(flat) if whole else copy.deepcopy(value)
        self._link()
        for _, p, entry in mine:
            for key, value in entry.items():
                if not isinstance(value, Tensor) or value.shape != _shape(p):
                    continue
                if hasattr(p, "ds_id"):
                    safe_set_local_optimizer_state(p, _part(p, value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)

    def _flat(self, index: int, parameter: nn.Parameter) -> Tensor:
        """The flat vector that holds this parameter's part on this rank."""
        zero = self._engine.optimizer
        if not hasattr(parameter, "ds_id"):
            return self._engine.basic_optimizer.param_groups[index]["params"][0]
        return zero.fp32_partitioned_groups_flat[
            zero.grad_position[zero.get_param_id(parameter)][0]
        ]

    def _link(self) -> None:
        """Tell ZeRO-1 and 2 where each parameter's state lies: after its first step DeepSpeed
        (0.19.8) links the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        inner = self._engine.basic_optimizer
        for index, group in enumerate(self._groups):
            own = [p for p in group if p.requires_grad]
            if own and not hasattr(own[0], "ds_id"):
                flat = self._flat(index, own[0])
                if flat in inner.state:
                    lazy_init_hp_params_optimizer_state(own, flat, inner.state)


def _shape(parameter: Any) -> torch.Size:
    """Under ZeRO-3 a parameter has no elements of its own, and remembers its shape."""
    return parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape


def _part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor under ZeRO-3, the last ones padded with zeros."""
    rank = torch.distributed.get_rank()
    size = parameter.ds_tensor.numel()
    part = torch.zeros(size, dtype=value.dtype)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part[: len(mine)] = mine
    return part
