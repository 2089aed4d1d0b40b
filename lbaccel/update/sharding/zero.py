"""DeepSpeed ZeRO-0 to 3: the prepared model is DeepSpeed's engine, driven by its public calls."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lbaccel.errors import InputError, RunFailed
from lbaccel.update.accumulation import Agreement
from lbaccel.update.sharding.optimizer_state import Groups, OptimizerState, ZeroState
from lbaccel.update.sharding.steps import MicroBatches, Step, filled, with_last


class ZeroSharding:
    """See `Sharding`. Clipping is the engine's own, by `gradient_clipping` of its config.

    ZeRO-0, 1 and 2 keep each rank's gradient whole and unreduced until the commit (under ZeRO-1
    and 2 by `coalesce_grad_reduction`), so that an attempt can be dropped; then one reduction
    gives each rank its part. ZeRO-3 gathers weights in every forward, so ranks meet there in any
    case: it reduces each micro-step, and a rank that fails ends the run.

    Args:
        engine: what `accelerator.prepare` returned for the model.
        world_size: data-parallel processes.
        empty: `skeleton` of the model from before it was sharded; needed under ZeRO-3.
        groups: the optimizer's, from before it was prepared.
    """

    def __init__(
        self, engine: Any, *, world_size: int, empty: nn.Module | None, groups: Groups
    ) -> None:
        self._groups = groups
        self.engine, self._world_size, self._empty = engine, world_size, empty
        self.stage = int(engine.zero_optimization_stage())
        self.droppable = self.stage < 3
        self._open: AbstractContextManager[Any] | None = None
        self.half_stepped = False
        self._names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._seen: set[int] = set()
        for parameter in self.parameters:
            # Where a gradient lies depends on stage, precision and offload: note that it came.
            parameter.register_post_accumulate_grad_hook(lambda p: self._seen.add(id(p)))
        self._entered: list[Any] = []
        weakref.finalize(self, _leave, self._entered)

    @property
    def module(self) -> nn.Module:
        """The model inside the engine."""
        return self.engine.module

    def reserve(self) -> None:
        """Nothing: DeepSpeed has made the optimizer's state by now."""

    def drop(self) -> None:
        """Forget the gradients, whole ones and parts."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "exit_backward"):
            optimizer.exit_backward()  # of a backward that failed
        optimizer.zero_grad(set_to_none=True)
        self.engine.zero_grad()
        self._seen.clear()

    def around(self) -> AbstractContextManager[Any]:
        """Nothing is reduced until the commit, under ZeRO-1 and 2.

        DeepSpeed's context reduces where it is left, so a dropped attempt stays in it, and the
        next one goes on there.
        """
        if self.stage in (1, 2) and self._open is None:
            context = self.engine.coalesce_grad_reduction()
            context.__enter__()
            self._open = context
            self._entered[:] = [context]
        return nullcontext()

    def micro_steps(self, micro_batches: MicroBatches) -> MicroBatches:
        """Each with the engine's boundary set before its forward; the flag is sticky."""
        for item, last in with_last(micro_batches):
            self.engine.set_gradient_accumulation_boundary(last and not self.droppable)
            yield item

    def backward(self, loss: Tensor) -> object:
        """The engine's, of the loss as it is in one process.

        The engine's reduction divides by the number of ranks. Multiplying the loss by it would
        make up for that in float32, but let bf16 round each gradient at another place wherever
        the number is no power of two; so the commit multiplies the gradient instead.
        """
        return self.engine.backward(loss, scale_wrt_gas=False)

    def present(self) -> list[bool]:
        """Which parameters were given a gradient."""
        return [id(p) in self._seen for p in self.parameters]

    def step(self, agreement: Agreement, *, divisor: float) -> Step:
        """Reduce what is not yet, and let the engine clip and step."""
        self._check_present(agreement.present)
        if not math.isfinite(agreement.loss):
            return Step(math.nan, "not finite")
        divisor /= self._world_size  # the engine's reduction divides by it
        if self.droppable:
            self._reduce(divisor)
        optimizer, norm = self.engine.optimizer, None
        if optimizer is self.engine.basic_optimizer:  # ZeRO-0 in float32 keeps no norm
            norm = float(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
            if not math.isfinite(norm):
                return Step(norm, "not finite")
        with self._divided(1.0 if self.droppable else divisor):
            self.engine.set_gradient_accumulation_boundary(True)
            try:
                self.engine.step()
            except Exception:
                self.half_stepped = True
                raise
        self._seen.clear()
        if getattr(optimizer, "overflow", False):  # DeepSpeed has written nothing
            return Step(math.inf, "not finite")
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            self.half_stepped = True
            raise RunFailed(
                f"the gradient's norm is {norm}, and DeepSpeed's step was done with it: the "
                "weights are lost. Go on from the last checkpoint with a lower learning rate."
            )
        return Step(norm, "written")

    def _check_present(self, present: tuple[bool, ...]) -> None:
        missing = [n for n, there in zip(self._names, present, strict=True) if not there]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(
                f"no sample of this update reaches {', '.join(missing[:3])}{more}. DeepSpeed "
                "takes their gradient as zero, so weight decay and momentum would move them, "
                "which they do not in one process. Leave them out: p.requires_grad_(False)."
            )

    @torch.no_grad()
    def _reduce(self, divisor: float) -> None:
        """One reduction of this rank's whole gradient."""
        for parameter in self.parameters:
            if id(parameter) not in self._seen:  # it has one on another rank
                parameter.grad = torch.zeros_like(parameter)
            elif divisor != 1.0:
                assert parameter.grad is not None
                parameter.grad /= divisor
        if self._open is not None:
            context, self._open = self._open, None
            self._entered.clear()
            context.__exit__(None, None, None)
        else:
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()

    @contextmanager
    def _divided(self, divisor: float) -> Iterator[None]:
        """Inside, the engine's step divides the gradient by `divisor`: a loss scale does that."""
        if divisor == 1.0:
            yield
            return
        self.engine.optimizer.override_loss_scale(divisor)
        try:
            yield
        finally:
            self.engine.optimizer.override_loss_scale(1.0)

    def optimizer_state(self) -> OptimizerState:
        """Gathered from the parts, and cut into them."""
        return ZeroState(self.engine, self._groups)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model itself; under ZeRO-3 a plain copy with gathered weights."""
        if self.stage < 3:
            yield self.module
            return
        import deepspeed

        assert self._empty is not None
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            weights = {n: p.detach().clone() for n, p in self.module.named_parameters()}
        network = filled(self._empty, weights, dict(self.module.named_buffers()))
        yield network.train(self.module.training)


def _leave(open_context: list[Any]) -> None:
    """Leave the context of an attempt that was dropped for good, without a trace at exit."""
    for context in open_context:
        with contextlib.suppress(Exception):
            context.__exit__(None, None, None)
