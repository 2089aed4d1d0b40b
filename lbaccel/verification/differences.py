"""How two results of an update differ, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lbaccel.verification.updates import Result


@dataclass(frozen=True)
class Differing:
    """A parameter whose gradient is another one."""

    name: str
    error: float  # |a - b| / |b|
    ratio: float | None  # c where a = c b; None where there is no such number


@dataclass(frozen=True)
class Difference:
    """Relative errors of an update, NaN where a number is missing."""

    loss: float
    gradients: float
    buffers: float
    random_state_kept: bool
    parameters: tuple[Differing, ...] = ()  # the largest error first
    buffer_names: tuple[str, ...] = ()  # those that differ, in order of the model
    update: int = 1  # the first that differs

    def within(self, tolerance: float) -> bool:
        """Nothing differs by more."""
        errors = (self.loss, self.gradients, self.buffers)
        return self.random_state_kept and all(error <= tolerance for error in errors)


def difference(found: Result, truth: Result, tolerance: float) -> Difference:
    """Relative errors of `found`: |a - b| / |b| of loss, whole gradient, and a module's buffers.

    A gradient whose terms cancel (a bias before BatchNorm) has no digits of its own, so parameters
    are measured against the whole gradient, and buffers against those of their module. Where the
    first update agrees, the second one decides.
    """
    first = _of_update(found, truth, tolerance)
    if not first.within(tolerance) or found.after is None or truth.after is None:
        return first
    second = _of_update(found.after, truth.after, tolerance)
    if not second.within(tolerance):
        return replace(second, update=2)
    worst = {
        name: max(getattr(first, name), getattr(second, name))
        for name in ("loss", "gradients", "buffers")
    }
    return replace(first, **worst)


def _of_update(found: Result, truth: Result, tolerance: float) -> Difference:
    loss = abs(found.loss - truth.loss) / (abs(truth.loss) or 1.0)
    gradients, parameters = _gradients(found.gradients, truth.gradients, tolerance)
    buffers, buffer_names = buffer_errors(found.buffers, truth.buffers, tolerance)
    return Difference(
        loss, gradients, buffers, found.random_state_kept, tuple(parameters), tuple(buffer_names)
    )


def _gradients(
    found: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None], tolerance: float
) -> tuple[float, list[Differing]]:
    norm = math.sqrt(sum(_square(g) for g in truth.values())) or 1.0
    differing: list[Differing] = []
    total = 0.0
    for name, b in truth.items():
        a = found[name]
        if a is None and b is None:
            continue
        one_only = a is None or b is None
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        assert a is not None and b is not None
        gap = math.sqrt(_square(a - b))
        total += gap**2
        if not gap <= tolerance * norm or (one_only and gap):
            differing.append(_differing(name, a, b, gap))
    differing.sort(key=lambda d: -d.error if d.error == d.error else -math.inf)
    return math.sqrt(total) / norm, differing


def _differing(name: str, a: Tensor, b: Tensor, gap: float) -> Differing:
    own = math.sqrt(_square(b))
    if not own:
        return Differing(name, 1.0 if gap == gap else math.nan, None)
    ratio = float((a * b).sum()) / own**2
    proportional = math.sqrt(_square(a - ratio * b)) <= 1e-6 * own
    return Differing(name, gap / own, ratio if proportional else None)


def buffer_errors(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float
) -> tuple[float, list[str]]:
    """The largest relative error of a buffer, and the names of those above `tolerance`."""
    scales: dict[str, float] = {}
    for name, value in truth.items():
        if value.is_floating_point():
            scales[_owner(name)] = scales.get(_owner(name), 0.0) + _square(_finite(value))
    names: list[str] = []
    worst = 0.0
    for name in [*truth, *[name for name in found if name not in truth]]:
        a, b = found.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape:
            error = 1.0
        elif torch.equal(a, b):
            error = 0.0
        else:
            same = (a == b) | (a.isnan() & b.isnan())
            gap = math.sqrt(_square((a.double() - b.double())[~same]))
            own = math.sqrt(_square(_finite(b)))
            if b.is_floating_point():
                own = max(own, math.sqrt(scales[_owner(name)]))
            error = gap / (own or 1.0)
        worst = error if not error <= worst else worst
        if not error <= tolerance:
            names.append(name)
    return worst, names


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _finite(value: Tensor) -> Tensor:
    return value.double()[torch.isfinite(value)]


def _square(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.double().square().sum())
