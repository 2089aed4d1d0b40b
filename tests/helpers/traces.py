"""Estimates of timm's networks by name, traced once for all tests of a process that share them.

Many tests of plans ask for the same candidates of the same network. A test that changes what a
trace does must not share: its module leaves the fixture `shared_traces` out.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from lbaccel.planning import estimate
from lbaccel.planning.cost.update import classification_loss, image_batch

MAKES_IMAGES = image_batch(1, 1).__code__


@dataclass(frozen=True)
class Found:
    """What a call returned, and what it counted."""

    value: Any
    num_traces: int
    num_assumed: int


_known: dict[tuple[Any, ...], Found] = {}
_pickled: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


@contextmanager
def shared() -> Iterator[None]:
    """Meanwhile an `Estimator` traces no candidate that another one of this process has traced."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_estimate", "survey"):
            patch.setattr(estimate.Estimator, name, _once(getattr(estimate.Estimator, name)))
        yield


def _once(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(self: Any, *args: Any) -> Any:
        contract = fingerprint(self)
        if contract is None or (plain.__name__ == "survey" and args[0] in self._surveys):
            return plain(self, *args)
        if plain.__name__ == "_estimate" and args[0].checkpointing == "none":
            _ = self.units  # a survey that an estimate needs is counted by itself
        key = (plain.__name__, *contract, *args)
        if key not in _known:
            before = self.num_traces, self.cpu_workspaces.num_assumed
            value = plain(self, *args)
            _known[key] = Found(
                value, self.num_traces - before[0], self.cpu_workspaces.num_assumed - before[1]
            )
        else:
            self.num_traces += _known[key].num_traces
            self.cpu_workspaces.num_assumed += _known[key].num_assumed
        value = _known[key].value
        if plain.__name__ == "survey":
            value = self._surveys[args[0]] = replace(value, units=list(value.units))
        return value

    return call


def fingerprint(estimator: Any) -> tuple[Any, ...] | None:
    """All that a trace depends on; None where it isn't known: a model or data of the test's."""
    network = estimator.network
    make, optimizer = network.make_batch, network.optimizer
    if (
        estimator.observe is not None
        or not type(network.model).__module__.startswith("timm.")
        or any(t.device.type != "meta" for t in network.model.parameters())
        or getattr(make, "__code__", None) is not MAKES_IMAGES
        or network.loss_fn is not classification_loss
    ):
        return None
    if network.model not in _pickled:  # before a trace: on fake tensors nothing is pickled
        try:
            text = pickle.dumps(network.model)
        except (pickle.PicklingError, AttributeError, TypeError):  # a hook of the test's
            return None
        _pickled[network.model] = hashlib.sha256(text).hexdigest()
    groups = [] if optimizer is None else optimizer.param_groups
    return (
        _pickled[network.model],
        tuple(cell.cell_contents for cell in make.__closure__),
        (network.clips, network.memory_format, type(optimizer)),
        str([{k: v for k, v in g.items() if k != "params"} | {"n": len(g["params"])}
             for g in groups]),
        (estimator.precision, str(estimator.device), torch.get_num_threads()),
        # a candidate replaces the others
        tuple(
            getattr(estimator.plan, f.name)
            for f in fields(estimator.plan)
            if f.name not in ("micro_batch_size", "world_size", "global_batch_size")
        ),
    )  # fmt: skip
