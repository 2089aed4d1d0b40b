"""LargeBatch: the object that plugs into the user's own Accelerate loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn

from lbaccel import accumulation
from lbaccel.accumulation import LossFn, Sums
from lbaccel.batch import BatchPlan
from lbaccel.data.loader import Update
from lbaccel.errors import InputError, RunFailed
from lbaccel.masks import KeyedRandomness
from lbaccel.normalization import BatchNormStatistics, GhostNorm, convert_batch_norm


@dataclass(frozen=True)
class UpdateResult:
    """What became of one update, the same on every rank."""

    applied: bool  # False: an fp16 overflow, nothing was written
    loss: float  # weighted mean over all samples of the update
    grad_norm: float  # of the whole gradient, before clipping
    num_samples: int  # over all ranks
    num_updates: int  # applied so far
    samples_seen: int  # in applied updates, over all ranks
    stop: bool = False  # some rank called `request_stop`: every rank sees it at the same update


class LargeBatch:
    """Runs optimizer updates of any global batch on the memory of a micro-batch.

    An update is a transaction: gradients, BatchNorm statistics, scheduler, EMA and counters are
    written together at its end, or not at all. Under DDP every micro-batch runs without gradient
    synchronisation, and one reduction follows the last.

    Args:
        accelerator: the user's own, built with `gradient_accumulation_steps=1`.
        plan: the batch; `world_size` must be `accelerator.num_processes`.
        clip_grad_norm: largest norm of the summed gradient; None does not clip.
        bn_statistics: "per_ghost" or "per_update", see `convert_batch_norm`.
        seed: of dropout's masks and all else that is drawn inside an update; see `KeyedRandomness`.

    Raises:
        InputError: the accelerator contradicts the plan, accumulates itself, or runs a
            distributed type other than one process or DDP.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from lbaccel import BatchPlan, LargeBatch, UpdateLoader
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> data = [(torch.ones(2), torch.ones(1)) for _ in range(10)]
    >>> plan = BatchPlan(global_batch_size=5, micro_batch_size=2)
    >>> large_batch = LargeBatch(Accelerator(cpu=True), plan)
    >>> model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    >>> def loss_fn(model, micro_batch):
    ...     x, y = micro_batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> results = [large_batch.update(update, loss_fn) for update in loader]
    >>> [result.samples_seen for result in results]
    [5, 10]
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: BatchPlan,
        *,
        clip_grad_norm: float | None = None,
        bn_statistics: BatchNormStatistics = "per_ghost",
        seed: int = 0,
    ) -> None:
        _check_accelerator(accelerator, plan)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise InputError(f"clip_grad_norm={clip_grad_norm}: give a norm above 0, or None.")
        self.accelerator = accelerator
        self.plan = plan
        self.clip_grad_norm = clip_grad_norm
        self.bn_statistics: BatchNormStatistics = bn_statistics
        self.num_updates = 0
        self.samples_seen = 0
        self.randomness = KeyedRandomness(seed, accelerator.device)
        self.norm: GhostNorm | None = None
        self._model: nn.Module | None = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._ema: Any = None
        self._parameters: list[nn.Parameter] = []
        self._stop_requested = False

    def prepare(
        self,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        scheduler: Any = None,
        *,
        ema: Any = None,
    ) -> tuple[Any, ...]:
        """Prepare the user's objects; takes the place of `accelerator.prepare`.

        Model and optimizer go through `accelerator.prepare`; BatchNorm layers take ghost batches.
        The loader (an `UpdateLoader`, or any iterable of `Update`) comes back as it is, and so do
        `scheduler` (counted in updates, not prepared) and `ema` (with `update(model)`, such as
        timm's ModelEmaV3), which `update` moves at its commit: don't step them yourself.

        Returns:
            model, optimizer, loader and, where given, scheduler: in the order given.
        """
        self.norm = convert_batch_norm(
            model, self.plan.norm_batch_size, statistics=self.bn_statistics
        )
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Buffers are the same on all ranks after each commit; a broadcast could only hide it.
            model.broadcast_buffers = False
        self._model, self._optimizer = model, optimizer
        self._scheduler, self._ema = scheduler, ema
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.accelerator.register_for_checkpointing(self)
        for thing in (scheduler, loader):
            if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
                self.accelerator.register_for_checkpointing(thing)
        return (model, optimizer, loader) + (() if scheduler is None else (scheduler,))

    def update(self, update: Update, loss_fn: LossFn) -> UpdateResult:
        """One optimizer update over all micro-batches of all ranks.

        Args:
            update: an item of the loader; its data is moved to the device a micro-batch at a time.
            loss_fn: (model, data) -> mean loss over the micro-batch, or (mean loss, weight) where
                weight is the sum of token, mask or class weights that the mean was taken over.

        Raises:
            RunFailed: the loss or the gradient is not finite (without fp16's scaler), or another
                rank failed; weights, statistics and counters are as before.
        """
        if self._model is None or self.norm is None:
            raise InputError(
                "update() came before prepare(): model, optimizer, loader = "
                "large_batch.prepare(model, optimizer, loader)."
            )
        self._optimizer.optimizer.zero_grad(set_to_none=True)
        self.norm.begin()
        try:
            with self.randomness.update(update.index):
                sums, error = self._accumulate(update, loss_fn)
            agreement = accumulation.agree(
                sums,
                self._parameters,
                world_size=self.plan.world_size,
                device=self.accelerator.device,
                stop=self._stop_requested,
                error=error,
            )
            own_weights = sums is not None and sums.own_weights
            accumulation.reduce_gradients(
                self._parameters,
                agreement.present,
                world_size=self.plan.world_size,
                divisor=agreement.weight / update.num_samples if own_weights else 1.0,
            )
            return self._commit(update.num_samples, agreement.loss, stop=agreement.stop)
        except BaseException:
            self._optimizer.optimizer.zero_grad(set_to_none=True)
            self.norm.begin()
            raise

    def request_stop(self) -> None:
        """Ask for the run's end (a signal, a time limit): `UpdateResult.stop` tells every rank."""
        self._stop_requested = True

    def _accumulate(
        self, update: Update, loss_fn: LossFn
    ) -> tuple[Sums | None, BaseException | None]:
        assert self.norm is not None
        device = self.accelerator.device
        on_device = ((m, send_to_device(data, device, non_blocking=True)) for m, data in update)
        try:
            with self._no_sync(), _autocast_cache(device.type):
                sums = accumulation.accumulate(
                    self._model,
                    on_device,
                    loss_fn,
                    num_samples=update.num_samples,
                    scopes=(self.norm, self.randomness),
                    backward=self._backward(),
                )
        except Exception as error:
            return None, error
        return sums, None

    def _no_sync(self) -> AbstractContextManager[Any]:
        if isinstance(self._model, nn.parallel.DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()

    def _backward(self) -> Callable[[Tensor], object]:
        scaler = self.accelerator.scaler
        if scaler is None:
            return Tensor.backward
        return lambda loss: scaler.scale(loss).backward()

    def _commit(self, num_samples: int, loss: float, *, stop: bool) -> UpdateResult:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer.optimizer)
        norm = accumulation.gradient_norm(self._parameters)
        grad_norm = float(norm)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite and scaler is None:
            raise RunFailed(
                f"the loss is {loss} and the gradient's norm {grad_norm} at update "
                f"{self.num_updates + 1} after {self.samples_seen} samples. Nothing of this "
                "update was written. A lower learning rate, a longer warmup or clip_grad_norm "
                "usually help."
            )
        if self.clip_grad_norm is not None and finite:
            accumulation.clip_gradients(self._parameters, norm, self.clip_grad_norm)
        self._optimizer.step()
        applied = not self._optimizer.step_was_skipped
        if applied:
            assert self.norm is not None and self._model is not None
            self.norm.commit(accumulation.gather_rows if self.plan.world_size > 1 else None)
            self.num_updates += 1
            self.samples_seen += num_samples
            if self._scheduler is not None:
                self._scheduler.step()
            if self._ema is not None:
                ddp = isinstance(self._model, nn.parallel.DistributedDataParallel)
                self._ema.update(self._model.module if ddp else self._model)
        elif scaler is not None and scaler.get_scale() < 1.0:
            raise RunFailed(
                f"the fp16 gradient overflows at update {self.num_updates + 1} even at loss scale "
                f"{scaler.get_scale():g}: the loss itself is not finite. Use bf16 or fp32, or a "
                "lower learning rate."
            )
        self._optimizer.optimizer.zero_grad(set_to_none=True)
        return UpdateResult(
            applied, loss, grad_norm, num_samples, self.num_updates, self.samples_seen, stop
        )

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"num_updates": self.num_updates, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counters."""
        self.num_updates = int(state["num_updates"])
        self.samples_seen = int(state["samples_seen"])


def _autocast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Keep autocast's cast weights over all micro-batches, changing nothing else.

    Autocast drops its casts where its outermost context ends; the model's own context (put there
    by `accelerator.prepare`) ends with each forward. This one is outside, in the state found.
    """
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )


def _check_accelerator(accelerator: Accelerator, plan: BatchPlan) -> None:
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind not in supported:
        raise InputError(
            f"distributed_type={kind.value}: this version runs its update in one process and "
            "under DDP (MULTI_GPU, MULTI_CPU). Use accelerate_configs/multi_gpu.yaml."
        )
    if accelerator.device.type == "mps":
        raise InputError(
            "the device is MPS, which has no float64 for the sums of an update. "
            "Use Accelerator(cpu=True)."
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if max(processes, world) > 1 and kind == DistributedType.NO:
        raise InputError(
            f"{max(processes, world)} processes were started, but Accelerate runs each alone "
            "(DistributedType.NO), so they would not talk. On a CPU use Accelerator(cpu=True)."
        )
    if plan.world_size != processes:
        raise InputError(
            f"BatchPlan(world_size={plan.world_size}), but Accelerate runs {processes} "
            f"processes. Use world_size=accelerator.num_processes."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"Accelerator(gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}): the plan derives the number of "
            f"micro-batches ({plan.gradient_accumulation_steps}). Leave that argument out."
        )
