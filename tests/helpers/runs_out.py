"""A step of the backward pass in which memory runs out."""

from __future__ import annotations

from typing import Any

import torch

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB"


class RunsOut(torch.autograd.Function):
    """The identity, whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(OUT)
