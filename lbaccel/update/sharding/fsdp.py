"""FSDP2: parameters and gradients are DTensors, reduced with every micro-step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lbaccel.errors import InputError
from lbaccel.update.accumulation import Agreement
from lbaccel.update.sharding.optimizer_state import DTensorState, OptimizerState
from lbaccel.update.sharding.steps import MicroBatches, Step, filled


class FullyShard:
    """See `Sharding`. Each backward reduces its gradient into this rank's shard.

    `set_requires_gradient_sync(False)` until the last micro-step would send less, but it keeps
    whole gradients on every rank, which is what FSDP is there to avoid, and has no public way to
    forget them. Ranks meet in each forward in any case, to gather weights.

    Args:
        accelerator: its processes are used; with a gradient scaler it is refused.
        model: with `fully_shard` applied.
        optimizer: prepared, over the sharded parameters.
        clip_grad_norm: largest norm of the gradient; None does not clip.
        empty: `skeleton` of the model from before it was sharded, for `whole`.
    """

    droppable = False

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        *,
        clip_grad_norm: float | None,
        empty: nn.Module | None,
    ) -> None:
        if accelerator.scaler is not None:
            raise InputError(
                "fp16 under FSDP2: an overflow that one rank's shard sees is not known to the "
                "others. Use bf16."
            )
        self._model: nn.Module = model
        self._optimizer, self._empty = optimizer, empty
        self._world_size = accelerator.num_processes
        self._clip_grad_norm = clip_grad_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.half_stepped = False
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not given & {id(p) for p in self.parameters}:
            raise InputError(
                "the optimizer holds none of the sharded parameters. Build it after "
                "fully_shard(model)."
            )

    @property
    def module(self) -> nn.Module:
        """The sharded model; FSDP2 wraps nothing."""
        return self._model

    def reserve(self) -> None:
        """Nothing: a rank's shard of the optimizer's state is what it has room for."""

    def drop(self) -> None:
        """Forget the gradients' shards."""
        self._optimizer.optimizer.zero_grad(set_to_none=True)

    def around(self) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()

    def micro_steps(self, micro_batches: MicroBatches) -> MicroBatches:
        """As they are."""
        return micro_batches

    def backward(self, loss: Tensor) -> object:
        """Torch's own; FSDP2 divides by the number of ranks, so the loss is multiplied by it."""
        return (loss * self._world_size).backward()

    def present(self) -> list[bool]:
        """Which parameters have a gradient."""
        return [p.grad is not None for p in self.parameters]

    def step(self, agreement: Agreement, *, divisor: float) -> Step:
        """Divide, clip by the norm of the whole gradient, and step."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if divisor != 1.0:
            for grad in grads:
                grad /= divisor
        with torch.no_grad():
            norm = get_total_norm(grads)
            grad_norm = float(_full(norm))
            if not (math.isfinite(agreement.loss) and math.isfinite(grad_norm)):
                return Step(grad_norm, "not finite")
            if self._clip_grad_norm is not None:
                clip_grads_with_norm_(self.parameters, self._clip_grad_norm, norm)
        try:
            self._optimizer.step()
        except Exception:
            self.half_stepped = True
            raise
        return Step(grad_norm, "written")

    def optimizer_state(self) -> OptimizerState:
        """Gathered from the shards, and cut into them."""
        return DTensorState(self._optimizer.optimizer)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain copy with gathered weights."""
        if self._empty is None:
            raise InputError(
                "the model was sharded by fully_shard before prepare(), so lbaccel has no plain "
                "copy of it. Gather the weights by torch's get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True))."
            )
        weights = {name: _full(p.detach()).clone() for name, p in self._model.named_parameters()}
        network = filled(self._empty, weights, dict(self._model.named_buffers()))
        yield network.train(self._model.training)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
