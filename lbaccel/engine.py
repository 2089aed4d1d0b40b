"""LargeBatch: the object that plugs into the user's own Accelerate loop."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lbaccel import accumulation
from lbaccel.accumulation import Agreement, LossFn, Stop
from lbaccel.attempt import MicroBatches, attempt
from lbaccel.batch import BatchPlan
from lbaccel.data.loader import Update, UpdateLoader
from lbaccel.errors import InputError, RunFailed
from lbaccel.masks import KeyedRandomness
from lbaccel.memory.adaptive import AdaptivePlan, what_to_try
from lbaccel.memory.micro_batch import largest_that_fits
from lbaccel.memory.oom import is_out_of_memory
from lbaccel.memory.reserve import Reservation
from lbaccel.normalization import BatchNormStatistics, GhostNorm, convert_batch_norm
from lbaccel.preflight import check_accelerator

logger = logging.getLogger("lbaccel")


@dataclass(frozen=True)
class UpdateResult:
    """What became of one update, the same on every rank."""

    applied: bool  # False: an fp16 overflow, nothing was written
    loss: float  # weighted mean over all samples of the update
    grad_norm: float  # of the whole gradient, before clipping
    num_samples: int  # over all ranks
    num_updates: int  # applied so far
    samples_seen: int  # in applied updates, over all ranks
    micro_batch_size: int  # that it was done with
    num_retries: int  # attempts before it for which memory did not suffice
    stop: Stop | None = None  # some rank called `request_stop`; all see it at the same update


class LargeBatch:
    """Runs optimizer updates of any global batch on the memory of a micro-batch.

    An update is a transaction: gradients, BatchNorm statistics, scheduler, EMA and counters are
    written together at its end, or not at all. Under DDP every micro-batch runs without gradient
    synchronisation, and one reduction follows the last.

    Where memory runs out in forward or backward, on any rank, the attempt is dropped and all ranks
    do the update again in smaller micro-batches; the global batch stays (`MicroBatchSize` says
    when they grow again).

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
        check_accelerator(accelerator, plan)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise InputError(f"clip_grad_norm={clip_grad_norm}: give a norm above 0, or None.")
        self.accelerator = accelerator
        self._adaptive = AdaptivePlan(plan)
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
        self._stop_requested: Stop | None = None
        self._reservation: Reservation | None = None
        self._buffer: Tensor | None = None
        self._half_stepped = False

    @property
    def plan(self) -> BatchPlan:
        """The plan as it stands: its micro-batch follows the memory, the rest never changes."""
        return self._adaptive.plan

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
        self._check_ready()
        self._hold_memory()
        for num_retries in range(self.plan.micro_batch_size + 1):
            try:
                agreement, own_weights = self._attempt(update, self._cut(update), loss_fn)
                if agreement.out_of_memory:
                    self._shrink(update)
                    continue
                accumulation.reduce_gradients(
                    self._parameters,
                    agreement.present,
                    world_size=self.plan.world_size,
                    divisor=agreement.weight / update.num_samples if own_weights else 1.0,
                    buffer=self._buffer,
                )
                return self._commit(update.num_samples, agreement, num_retries)
            except BaseException:
                self._drop()
                raise
        raise AssertionError("each retry halves the micro-batch")

    def find_micro_batch_size(self, loader: UpdateLoader, loss_fn: LossFn) -> int:
        """Search the largest micro-batch that fits, and take it; all else stays as it was.

        Each trial runs forward and backward of two micro-batches of the next update, with the
        room for the optimizer's state taken, and drops them. On a CPU set a limit first
        (`memory_limit`): without one the system kills a process that takes too much.

        Args:
            loader: what `prepare` returned; its next update stays the next one.
            loss_fn: as for `update`.

        Raises:
            RunFailed: not even one group fits.
        """
        self._check_ready()
        self._hold_memory()
        update, unit = loader.peek(), self.plan.group_size

        def fits(size: int) -> bool:
            assert update.recut is not None
            two = islice(update.recut(size), 2)
            try:
                return not self._attempt(update, two, loss_fn)[0].out_of_memory
            finally:
                self._drop()

        most = replace(
            self.plan, micro_batch_size=self.plan.num_groups(update.num_samples) * unit
        ).largest_micro_batch(update.num_samples)
        found = largest_that_fits(fits, unit=unit, most=most)
        if found is None:
            raise self._nothing_fits(update)
        self._adaptive.ask(replace(self.plan, micro_batch_size=found))
        self._cut(loader.peek())
        return found

    def _check_ready(self) -> None:
        if self._model is None or self.norm is None:
            raise InputError(
                "update() came before prepare(): model, optimizer, loader = "
                "large_batch.prepare(model, optimizer, loader)."
            )
        if self._half_stepped:
            raise RunFailed(
                "an earlier optimizer step failed half way, so the weights are not those of any "
                "update. Load a checkpoint (model, optimizer and this object's state) first."
            )

    def _hold_memory(self) -> None:
        """Take what the commit will need before activations can: optimizer state, a bucket."""
        if self._reservation is None:
            try:
                self._reservation = Reservation(self._optimizer.optimizer)
                if self.plan.world_size > 1:
                    self._buffer = accumulation.reduction_buffer(self._parameters)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise RunFailed(
                    f"the optimizer's state does not fit beside the weights ({error}). Use an "
                    "optimizer with less state (SGD: one copy of the weights, AdamW: two), a "
                    "smaller model, or a device with more memory."
                ) from error

    def _drop(self) -> None:
        """Take back what an attempt left in gradients and statistics."""
        assert self.norm is not None
        self._optimizer.optimizer.zero_grad(set_to_none=True)
        self.norm.begin()

    def _cut(self, update: Update) -> MicroBatches:
        if update.recut is None:
            return update.micro_batches
        return update.recut(self.plan.micro_batch_size)

    def _attempt(
        self, update: Update, micro_batches: MicroBatches, loss_fn: LossFn
    ) -> tuple[Agreement, bool]:
        assert self._model is not None and self.norm is not None
        self._drop()
        with self.randomness.update(update.index):
            return attempt(
                self.accelerator,
                self._model,
                micro_batches,
                loss_fn,
                num_samples=update.num_samples,
                scopes=(self.norm, self.randomness),
                parameters=self._parameters,
                stop=self._stop_requested,
            )

    def _shrink(self, update: Update) -> None:
        """Take the next smaller micro-batch after memory ran out, or say what to try."""
        if update.recut is None:
            raise RunFailed(
                "memory ran out, and this update can't be cut into smaller micro-batches: it did "
                "not come from an UpdateLoader. Use one, or build a plan with micro_batch_size="
                f"{max(self.plan.group_size, self.plan.micro_batch_size // 2)}."
            )
        note = self._adaptive.shrink(update=update.index + 1, num_samples=update.num_samples)
        if note is None:
            raise self._nothing_fits(update)
        self._note(note)

    def _nothing_fits(self, update: Update) -> RunFailed:
        device, used = self.accelerator.device, ""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            used = f" ({peak:.2f} GiB at the peak, the device has {total:.2f})"
        return RunFailed(
            f"memory ran out in update {update.index + 1}{used}, and {what_to_try(self.plan)} "
            "Weights and statistics are as before the update."
        )

    def _note(self, text: str | None) -> None:
        if text is not None and self.accelerator.is_main_process:
            logger.warning(text)

    def request_stop(self, reason: Stop = "interrupt") -> None:
        """Ask for the run's end from any rank: `UpdateResult.stop` then tells all of them."""
        if self._stop_requested != "interrupt":
            self._stop_requested = reason

    def _commit(self, num_samples: int, agreement: Agreement, num_retries: int) -> UpdateResult:
        scaler, loss = self.accelerator.scaler, agreement.loss
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
        self._step()
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
        size = self.plan.micro_batch_size
        self._note(self._adaptive.after_update(short_of_memory=agreement.short_of_memory))
        return UpdateResult(
            applied=applied,
            loss=loss,
            grad_norm=grad_norm,
            num_samples=num_samples,
            num_updates=self.num_updates,
            samples_seen=self.samples_seen,
            micro_batch_size=size,
            num_retries=num_retries,
            stop=agreement.stop,
        )

    def _step(self) -> None:
        """The optimizer's step: not undone and not repeated, since half of it may be written."""
        assert self._reservation is not None
        self._reservation.free()
        try:
            self._optimizer.step()
        except Exception as error:
            self._half_stepped = True
            if not is_out_of_memory(error):
                raise
            raise RunFailed(
                f"memory ran out inside the optimizer's step of update {self.num_updates + 1}: "
                "some weights may have moved and others not, so it is not repeated. Go on from "
                "the last checkpoint with a smaller micro-batch, such as "
                f"{max(self.plan.group_size, self.plan.micro_batch_size // 2)}."
            ) from error

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"num_updates": self.num_updates, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counters."""
        self.num_updates = int(state["num_updates"])
        self.samples_seen = int(state["samples_seen"])
        self._half_stepped = False
