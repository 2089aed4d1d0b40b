"""BatchNorm's statistics of a network as its weights are, measured group by group.

Running statistics that are averages belong to other weights. Measured ones are

    r = (1 / K) sum_k s_k

with s_k the mean and the unbiased variance of group k of n samples at a layer, as
`torch.optim.swa_utils.update_bn` has them: a group is normalised by its own statistics on its way
to the next layer. All else is in evaluation mode, so nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Taken = Callable[[], Tensor]


def tracked_norms(model: nn.Module) -> list[Any]:
    """The BatchNorm layers of `model` that keep running statistics, in the order of its modules."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def measuring(model: nn.Module) -> Iterator[Taken]:
    """Inside, a forward normalises by its own batch; afterwards modes and buffers are as before.

    Yields:
        A function that gives the statistics of the forward since it was last called: the means of
        all layers and then their unbiased variances, float64 of 2 x the sum of their channels. A
        layer that ran twice has the mean of both, one that did not run has what it had.
    """
    layers = tracked_norms(model)
    modes = [(m, m.training) for m in model.modules()]
    kept = [
        (m, m.momentum, {n: b.clone() for n, b in m.named_buffers(recurse=False)}) for m in layers
    ]

    def taken() -> Tensor:
        parts = [
            torch.where(layer.num_batches_tracked > 0, getattr(layer, name), before[name]).double()
            for name in ("running_mean", "running_var")
            for layer, _, before in kept
        ]
        for layer in layers:
            layer.reset_running_stats()
        return torch.cat(parts)

    try:
        model.eval()
        for layer in layers:
            layer.training, layer.momentum = True, None  # a cumulative average
            layer.reset_running_stats()
        yield taken
    finally:
        for layer, momentum, buffers in kept:
            layer.momentum = momentum
            for name, value in buffers.items():
                getattr(layer, name).copy_(value)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def write_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Give the layers these running statistics, in the order of `measuring`."""
    layers = tracked_norms(model)
    sizes = [layer.num_features for layer in layers]
    for name, half in zip(("running_mean", "running_var"), statistics.view(2, -1), strict=True):
        for layer, part in zip(layers, half.split(sizes), strict=True):
            getattr(layer, name).copy_(part)
