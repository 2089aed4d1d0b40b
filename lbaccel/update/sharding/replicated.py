"""One process and DDP: every rank holds everything, and our own code sums the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lbaccel.update import accumulation, failures
from lbaccel.update.accumulation import Agreement
from lbaccel.update.memory.oom import is_out_of_memory
from lbaccel.update.memory.reserve import Reservation
from lbaccel.update.sharding.optimizer_state import OptimizerState, keep_layouts
from lbaccel.update.sharding.steps import MicroBatches, Step


class Replicated:
    """See `Sharding`. Nothing is reduced before the commit, and then by `reduce_gradients`.

    Args:
        accelerator: its scaler and processes are used.
        model: prepared, under DDP or bare.
        optimizer: prepared.
        clip_grad_norm: largest norm of the gradient; None does not clip.
    """

    droppable = True

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        *,
        clip_grad_norm: float | None,
    ) -> None:
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._clip_grad_norm = clip_grad_norm
        keep_layouts(optimizer.optimizer)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Buffers are the same on all ranks after each commit; a broadcast could only hide it.
            model.broadcast_buffers = False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.half_stepped = False
        self._reservation: Reservation | None = None
        self._buffer: Tensor | None = None

    @property
    def module(self) -> nn.Module:
        """The model without DDP's wrapper."""
        ddp = isinstance(self._model, nn.parallel.DistributedDataParallel)
        return self._model.module if ddp else self._model

    def reserve(self) -> None:
        """Hold room for the optimizer's state and a bucket."""
        if self._reservation is not None:
            return
        try:
            self._reservation = Reservation(self._optimizer.optimizer)
            if self._accelerator.num_processes > 1:
                self._buffer = accumulation.reduction_buffer(self.parameters)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise failures.state_does_not_fit(error) from error

    def release(self) -> None:
        """Forget the room held: an optimizer whose state was taken back needs it anew."""
        self._reservation = None

    def drop(self) -> None:
        """Forget the gradients."""
        self._optimizer.optimizer.zero_grad(set_to_none=True)

    def around(self) -> AbstractContextManager[Any]:
        """DDP does not synchronise."""
        if isinstance(self._model, nn.parallel.DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()

    def micro_steps(self, micro_batches: MicroBatches) -> MicroBatches:
        """As they are."""
        return micro_batches

    def backward(self, loss: Tensor) -> object:
        """Torch's own, scaled under fp16."""
        scaler = self._accelerator.scaler
        return (loss if scaler is None else scaler.scale(loss)).backward()

    def present(self) -> list[bool]:
        """Which parameters have a gradient."""
        return [p.grad is not None for p in self.parameters]

    def step(self, agreement: Agreement, *, divisor: float) -> Step:
        """Reduce, unscale, clip and step."""
        scaler = self._accelerator.scaler
        accumulation.reduce_gradients(
            self.parameters,
            agreement.present,
            world_size=self._accelerator.num_processes,
            divisor=divisor,
            buffer=self._buffer,
        )
        if scaler is not None:
            scaler.unscale_(self._optimizer.optimizer)
        norm = accumulation.gradient_norm(self.parameters)
        grad_norm = float(norm)
        finite = math.isfinite(agreement.loss) and math.isfinite(grad_norm)
        if not finite and (scaler is None or self._all_finite()):
            # The scaler would step: it looks at each element of the gradient, and at nothing else.
            self._close_scaler()
            return Step(grad_norm, "not finite")
        if self._clip_grad_norm is not None and finite:
            accumulation.clip_gradients(self.parameters, norm, self._clip_grad_norm)
        assert self._reservation is not None
        self._reservation.free()
        try:
            self._optimizer.step()
        except Exception:
            self.half_stepped = True
            raise
        return Step(grad_norm, "skipped" if self._optimizer.step_was_skipped else "written")

    def _all_finite(self) -> bool:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return all(bool(torch.isfinite(grad).all()) for grad in grads)

    def _close_scaler(self) -> None:
        """Let the scaler forget a gradient that it has unscaled; its scale and count stay."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            state = scaler.state_dict()
            scaler.update()
            scaler.load_state_dict(state)

    def optimizer_state(self) -> OptimizerState:
        """The optimizer itself."""
        return self._optimizer

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model itself."""
        yield self.module
