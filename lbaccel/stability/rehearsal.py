"""Updates that are taken back: a trial of learning rates leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import InputError
from lbaccel.randomness.generators import generator_states, restore_generators
from lbaccel.update.engine import LargeBatch
from lbaccel.update.sharding.replicated import Replicated
from lbaccel.update.transaction import Transaction


def replicated(transaction: Transaction) -> Replicated:
    """The sharding, where every rank holds all weights.

    Raises:
        InputError: under DeepSpeed or FSDP2.
    """
    if not isinstance(transaction.sharding, Replicated):
        raise InputError(
            "learning rates are tried out, and curvature is measured, in one process or under DDP: "
            "under DeepSpeed and FSDP2 no rank holds all weights. The result does not depend on "
            "the sharding, so start it without: python -m lbaccel lr-find, or torchrun."
        )
    return transaction.sharding


def plain_optimizer(sharding: Replicated) -> torch.optim.Optimizer:
    """The user's optimizer, without Accelerate's wrapper."""
    prepared: Any = sharding.optimizer_state()
    return prepared.optimizer


def group_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each group's rate over the largest; by `initial_lr`, where a scheduler has noted it."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


@contextmanager
def rehearsal(
    large_batch: LargeBatch, loader: UpdateLoader
) -> Iterator[tuple[UpdateLoader, torch.optim.Optimizer]]:
    """Inside, updates run for real; after it, everything is as before, whatever was raised.

    Weights, buffers, gradients, modes, the optimizer's state and settings, fp16's loss scale and
    random states are kept (tensors on the host) and put back; scheduler, average, counters and
    loader are not touched at all.

    Yields:
        A loader of its own that starts at the next update, and the optimizer to set rates in.

    Raises:
        InputError: under DeepSpeed or FSDP2.
    """
    device, scaler = large_batch.accelerator.device, large_batch.accelerator.scaler
    with large_batch.rehearsing() as transaction:
        sharding = replicated(transaction)
        module, optimizer = sharding.module, plain_optimizer(sharding)
        states, half_stepped = generator_states(device), sharding.half_stepped
        modes = [(m, m.training) for m in module.modules()]
        tensors = [*module.parameters(), *module.buffers()]
        kept = [(t, _copied(t)) for t in tensors]
        gradients = [(p, p.grad) for p in module.parameters()]
        state = [(p, dict(entry), _copied(entry)) for p, entry in optimizer.state.items()]
        groups = [
            {k: copy.copy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        scale = None if scaler is None else scaler.state_dict()
        trial = copy.copy(loader)
        trial.load_state_dict(loader.state_dict())
        try:
            yield trial, optimizer
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
                optimizer.state.clear()
                for p, entry, values in state:
                    optimizer.state[p] = _put_back(entry, values)
            for p, gradient in gradients:
                p.grad = gradient
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                for key in group.keys() - settings.keys() - {"params"}:
                    del group[key]
                group.update(settings)
            for m, training in modes:
                m.training = training
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)
            sharding.half_stepped = half_stepped
            sharding.release()
            restore_generators(states, device)


def _copied(value: Any) -> Any:
    """A deep copy whose tensors lie on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return copy.deepcopy(value)


def _put_back(entry: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The entry of the optimizer's state: its own tensors, with the values kept."""
    for key, value in values.items():
        if isinstance(value, Tensor):
            entry[key].copy_(value)
        else:
            entry[key] = value
    return entry
