"""A micro-batch of weight 0: its loss and its gradient count nothing, be they nan or not.

Under `ignore_index` a micro-batch may hold no valid label. Its mean loss is 0 / 0, and so is what
its backward pass hands down; 0 times either is nan. The weight lies on the device, so it is not
read: the gradient is replaced there, on its way into `.grad`. Forward and backward run as ever,
since BatchNorm takes the statistics of these samples as it does in the whole batch, and since under
ZeRO-3 and FSDP2 the ranks meet in both.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


class Weightless:
    """Hooks on the gradients of one attempt; there are none until a weight could be 0.

    Args:
        model: the network whose parameters get gradients, wrapped or not.
    """

    def __init__(self, model: Any) -> None:
        parameters = model.parameters() if hasattr(model, "parameters") else ()
        self._model, self._parameters = model, [p for p in parameters if p.requires_grad]
        self._counts: Tensor | bool = True  # a truth value [] on the device, or known on the host
        self._hooks = ExitStack()
        self._hears = False

    def __enter__(self) -> Weightless:
        if any(isinstance(p, DTensor) for p in self._parameters):
            # FSDP2 computes with tensors of its own and reduces before `.grad` is written, so the
            # gradient is replaced where it enters the network.
            self._hooks.callback(self._model.register_forward_hook(self._forwarded).remove)
            self._hears = True
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def expect(self, weight: Tensor | float) -> None:
        """The weight of the micro-batch whose backward pass is next; no host synchronisation."""
        self._counts = weight.reshape(()) != 0 if isinstance(weight, Tensor) else bool(weight != 0)
        if not self._hears and self._counts is not True:
            for parameter in self._parameters:
                self._hooks.callback(parameter.register_hook(self._gradient).remove)
            self._hears = True

    def added(self, so_far: Tensor | float, loss: Tensor, weight: Tensor | float) -> Tensor | float:
        """`so_far` plus `loss` times `weight` in float64; 0 where the weight is, whatever the loss.

        Args:
            so_far: 0.0, or what this returned before, which it may write into.
            loss: of one element.
            weight: on the host, or [] on the device.
        """
        loss = loss.detach()
        if isinstance(weight, Tensor):
            return so_far + torch.where(weight != 0, loss.double() * weight, 0.0)
        if weight == 0:
            return so_far
        if isinstance(so_far, Tensor):  # one kernel, as the plain loop's
            return so_far.add_(loss.view(()) if loss.ndim else loss, alpha=weight)
        return so_far + loss.double().view(()) * weight

    def _forwarded(self, module: Any, args: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._gradient)

    def _gradient(self, gradient: Tensor) -> Tensor:
        if self._counts is True or gradient.layout is not torch.strided:
            return gradient
        if self._counts is False:
            return torch.zeros_like(gradient)
        return torch.where(self._counts, gradient, gradient.new_zeros(()))
