"""The operations that an update needs from the way in which a network is sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lbaccel.batch.plan import MicroBatch
from lbaccel.update.accumulation import Agreement
from lbaccel.update.sharding.optimizer_state import OptimizerState

MicroBatches = Iterable[tuple[MicroBatch, Any]]


@dataclass(frozen=True)
class Step:
    """How the end of an update went, the same on every rank."""

    grad_norm: float  # of the whole gradient, before clipping
    # skipped: an fp16 overflow. Only "written" has moved a weight or the optimizer's state.
    # dropped: by choice (loss dropout); statistics moved.
    outcome: Literal["written", "skipped", "not finite", "dropped"]


class Sharding(Protocol):
    """How gradients are gathered, normed, clipped and stepped; one object per prepared model."""

    parameters: list[nn.Parameter]  # trainable, in the same order on every rank
    half_stepped: bool  # a step failed half way: the weights are those of no update
    # Nothing crosses ranks before the commit: a rank's failure costs no more than the attempt.
    droppable: bool

    @property
    def module(self) -> nn.Module:
        """The model as the user built it, without wrappers."""
        ...

    def reserve(self) -> None:
        """Take the memory that the commit will need, before activations can."""
        ...

    def drop(self) -> None:
        """Take back what an attempt left in the gradients."""
        ...

    def around(self) -> AbstractContextManager[Any]:
        """Around the micro-steps of an attempt."""
        ...

    def micro_steps(self, micro_batches: MicroBatches) -> MicroBatches:
        """The micro-batches, each handed on when its micro-step begins."""
        ...

    def backward(self, loss: Tensor) -> object:
        """The backward pass of a loss that is scaled by its share of the update."""
        ...

    def present(self) -> list[bool]:
        """Which of `parameters` have a gradient on this rank."""
        ...

    def step(self, agreement: Agreement, *, divisor: float) -> Step:
        """Sum the gradients over ranks, divide by `divisor`, clip, and step the optimizer."""
        ...

    def whole(self) -> AbstractContextManager[nn.Module]:
        """A module with all weights, which runs without the other ranks; a collective."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state, whole."""
        ...


def with_last(micro_batches: MicroBatches) -> Iterator[tuple[tuple[MicroBatch, Any], bool]]:
    """Each micro-batch, and whether it is the last.

    >>> list(with_last("ab"))
    [('a', False), ('b', True)]
    """
    iterator = iter(micro_batches)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have no memory, to be filled by `filled`."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def filled(
    empty: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> nn.Module:
    """A module of its own like `empty`, with these parameters and buffers, by name."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in empty.named_parameters()
    }
    memo |= {id(b): buffers[name].clone() for name, b in empty.named_buffers()}
    return copy.deepcopy(empty, memo)
