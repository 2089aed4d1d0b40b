"""LargeBatch: the object that plugs into the user's own Accelerate loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NoReturn

from accelerate import Accelerator
from torch import nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.data.loader import Update, UpdateLoader
from lbaccel.errors import MISSING, check_choice, check_state
from lbaccel.noise.scale import NoiseScale
from lbaccel.noise.unit_norms import UnitNorms
from lbaccel.optim.scheduler import after_update
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import arguments, failures
from lbaccel.update.accumulation import STOPS, Agreement, LossFn, Stop
from lbaccel.update.agreement import check_ranks_alike
from lbaccel.update.averages import RunningAverages
from lbaccel.update.embeddings import Embed, coupled
from lbaccel.update.global_norm.ending import Passes
from lbaccel.update.memory.adaptive import AdaptivePlan, announce
from lbaccel.update.memory.micro_batch import largest_that_fits
from lbaccel.update.normalization import BatchNormStatistics, GhostNorm, convert_batch_norm
from lbaccel.update.plain_loop import LoopGuard
from lbaccel.update.preflight import check_accelerator
from lbaccel.update.result import UpdateResult
from lbaccel.update.sharding.optimizer_state import OptimizerState
from lbaccel.update.sharding.prepare import prepare
from lbaccel.update.sharding.replicated import Replicated
from lbaccel.update.sharding.steps import MicroBatches, Sharding, Step
from lbaccel.update.sharding.zero import ZeroSharding
from lbaccel.update.transaction import Transaction
from lbaccel.update.writes import WriteWatch


class LargeBatch:
    """Runs optimizer updates of any global batch on the memory of a micro-batch.

    An update is a transaction: gradients, BatchNorm statistics, scheduler, EMA and counters are
    written together at its end, or not at all. Under DDP and ZeRO-0 to 2 every micro-batch runs
    without gradient synchronisation, and one reduction follows the last; ZeRO-3 and FSDP2 (torch's
    `fully_shard`) reduce each micro-step.

    Where memory runs out in forward or backward, on any rank, the attempt is dropped and all ranks
    do the update again in smaller micro-batches; the global batch stays (`MicroBatchSize` says
    when they grow again). Under ZeRO-3 and FSDP2 a rank that fails ends the run.

    Args:
        accelerator: the user's own, built with `gradient_accumulation_steps=1`.
        plan: the batch; `world_size` must be `accelerator.num_processes`.
        clip_grad_norm: largest norm of the summed gradient; None does not clip.
        bn_statistics: "per_ghost" or "per_update", see `convert_batch_norm`.
        seed: of dropout's masks and all else that is drawn inside an update; see `KeyedRandomness`.
        drops: (loss, update) -> whether an update's gradient is dropped, such as `LossDropout`.
            Statistics, counters and scheduler move; weights, optimizer state, EMA and the progress
            of AdaScale do not.
        noise_scale: measures the critical batch size as updates go by; not under ZeRO-3 and FSDP2.
        averages: names of running averages of samples that the forward or the loss function moves,
            or of modules that hold them ("head.centers", "teacher", "loss_fn.mean"). They move once
            an update, as by the whole batch; see `lbaccel.update.averages`.
        allow_writes: names of tensors that may follow the micro-batches. Any other that a forward
            moves and a later one reads is an error in the first update.
        host_memory: with norm_batch_size="global", most that this rank's passes may keep in the
            host's memory, such as "8GiB"; None: as much as is free (on a CPU, half of it).

    Raises:
        InputError: the accelerator contradicts the plan, or would not do what it says.

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
        accelerator: Accelerator = MISSING,
        plan: BatchPlan = MISSING,
        *rest: NoReturn,
        clip_grad_norm: float | None = None,
        bn_statistics: BatchNormStatistics = "per_ghost",
        seed: int = 0,
        drops: Callable[[float, int], bool] | None = None,
        noise_scale: NoiseScale | None = None,
        averages: Sequence[str] = (),
        allow_writes: Sequence[str] = (),
        host_memory: str | None = None,
        **unknown: NoReturn,
    ) -> None:
        arguments.check_built(accelerator, plan, rest=rest, unknown=unknown)
        arguments.check_options(clip_grad_norm, drops, noise_scale, averages, allow_writes)
        self._host_bytes = arguments.host_bytes(host_memory, plan)
        check_accelerator(accelerator, plan)
        self.accelerator = accelerator
        self._adaptive = AdaptivePlan(plan)
        self.clip_grad_norm = clip_grad_norm
        self.bn_statistics: BatchNormStatistics = bn_statistics
        self._drops = drops
        self.num_updates = 0
        self.samples_seen = 0
        self.randomness = KeyedRandomness(seed, accelerator.device)
        self.norm: GhostNorm | None = None
        self._averages = RunningAverages(averages)
        self._watch = WriteWatch(self._averages, allowed=allow_writes)
        self.noise_scale = noise_scale
        self._scheduler: Any = None
        self._ema: Any = None
        self._transaction: Transaction | None = None
        self._stop_requested: Stop | None = None
        self._guard: LoopGuard | None = None
        self._told: str | None = None  # of the passes over BatchNorm of the whole batch

    @property
    def plan(self) -> BatchPlan:
        """The plan as it stands: its micro-batch follows the memory, the rest never changes."""
        return self._adaptive.plan

    @property
    def passes(self) -> Passes | None:
        """How the last update ran over BatchNorm of the whole batch; None with other plans."""
        global_norm = None if self._transaction is None else self._transaction.global_norm
        return None if global_norm is None else global_norm.passes

    def prepare(
        self,
        model: nn.Module = MISSING,
        optimizer: Any = MISSING,
        loader: Any = MISSING,
        scheduler: Any = None,
        *,
        ema: Any = None,
    ) -> tuple[Any, ...]:
        """Prepare the user's objects; takes the place of `accelerator.prepare`.

        Model and optimizer go through `accelerator.prepare`; BatchNorm layers take ghost batches.
        The loader (an `UpdateLoader`, or any iterable of `Update`) comes back as it is, and so do
        `scheduler` (counted in updates, not prepared) and `ema` (with `update(model)`, such as
        timm's ModelEmaV3), which `update` moves at its commit: don't step them yourself.

        Under DeepSpeed the plugin's "auto" values are filled from the plan and `clip_grad_norm`.

        Returns:
            model, optimizer, loader and, where given, scheduler: in the order given.

        Raises:
            InputError: it was called before, or model, optimizer or DeepSpeed's configuration would
                break the contract; a plain DataLoader, or a scheduler that an update can't move.
        """
        if self._transaction is not None:
            raise failures.prepared_before()
        arguments.check_objects(model, optimizer, loader, scheduler, ema=ema, plan=self.plan)
        given = optimizer
        if self.accelerator.num_processes > 1:
            objects = (model, optimizer, loader, scheduler)
            check_ranks_alike(self.accelerator, self.plan, *objects, **self._given())
        self.norm = convert_batch_norm(
            model, self.plan.norm_batch_size, statistics=self.bn_statistics
        )
        model, optimizer, sharding = prepare(
            self.accelerator,
            model,
            optimizer,
            plan=self.plan,
            clip_grad_norm=self.clip_grad_norm,
            ema=ema,
        )
        if self._drops is not None and not sharding.droppable:
            raise failures.not_dropped()
        self._averages.check(sharding.module)
        self._transaction = Transaction(
            self.accelerator,
            model,
            sharding,
            norm=self.norm,
            randomness=self.randomness,
            units=self._unit_norms(sharding, optimizer),
            averages=self._averages,
            watch=self._watch.of(self.norm, self.randomness) if sharding.droppable else None,
            host_bytes=self._host_bytes,
        )
        self._scheduler, self._ema = scheduler, ema
        self._guard = LoopGuard(self.accelerator, given, scheduler, model=model)
        for thing in (self, scheduler, loader):
            if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
                self.accelerator.register_for_checkpointing(thing)
        return (model, optimizer, loader) + (() if scheduler is None else (scheduler,))

    def _given(self) -> dict[str, Any]:
        """The arguments of this object that every rank must have in common."""
        return {
            "seed of LargeBatch": self.randomness.seed,
            "clip_grad_norm": self.clip_grad_norm,
            "bn_statistics": self.bn_statistics,
            "drops": self._drops is not None,
            "noise_scale": self.noise_scale is not None,
        }

    def _unit_norms(self, sharding: Sharding, optimizer: Any) -> UnitNorms | None:
        if self.noise_scale is None:
            return None
        preconditioned = self.noise_scale.preconditioned is not None
        whole = isinstance(sharding, Replicated)
        if not sharding.droppable or (preconditioned and not whole):
            raise failures.no_noise_scale(preconditioned=preconditioned and sharding.droppable)
        return UnitNorms(
            sharding.parameters,
            optimizer=optimizer.optimizer if preconditioned else None,
            scaler=self.accelerator.scaler,
            world_size=self.accelerator.num_processes,
        )

    def update(
        self,
        update: Update = MISSING,
        loss_fn: LossFn = MISSING,
        *,
        embed: Embed | None = None,
    ) -> UpdateResult:
        """One optimizer update over all micro-batches of all ranks.

        Args:
            update: an item of the loader; its data is moved to the device a micro-batch at a time.
            loss_fn: (model, data) -> mean loss over the micro-batch, or (mean loss, weight) where
                weight is the sum of token, mask or class weights that the mean was taken over;
                (mean loss, weight or None, sums) has sums over samples by name, for the result.
            embed: for a loss that compares samples, such as a contrastive one: (model, data) ->
                tensor, or tuple of tensors, with one row a sample. `loss_fn(model, embeddings)`
                then gets the rows of the whole global batch, once an update and in order of the
                samples, and returns their mean loss, or (mean loss, None, sums): the update is
                that of the whole batch, negatives included. See `lbaccel.update.coupled`.

        Raises:
            InputError: no update, rows or a loss of another kind, or a line of a plain loop that
                moves what an update moves (`scheduler.step()`, `accelerator.accumulate`).
            RunFailed: the loss or the gradient is not finite (without fp16's scaler), or another
                rank failed; weights, statistics and counters are as before.
        """
        transaction, guard = self._ready(), self._guard
        assert guard is not None
        guard.before_update(update)
        arguments.check_loss_fn(loss_fn)
        loss_fn = self._coupled(loss_fn, embed)
        arguments.check_mode(self.norm, self.plan)
        transaction.sharding.reserve()
        for num_retries in range(self.plan.micro_batch_size + 1):
            try:
                agreement = transaction.attempt(
                    update, partial(self._cut, update), loss_fn, stop=self._stop_requested
                )
                if agreement.out_of_memory:
                    self._shrink(update)
                    continue
                arguments.check_samples(agreement, update)
                dropped = self._drops is not None and self._drops(agreement.loss, update.index)
                with guard.stepping():
                    step = transaction.finish(
                        agreement,
                        update,
                        plan=self.plan,
                        num_updates=self.num_updates,
                        samples_seen=self.samples_seen,
                        noise_scale=self.noise_scale,
                        dropped=dropped,
                    )
                return self._count(update, agreement, step, num_retries=num_retries)
            except BaseException:
                transaction.drop()
                raise
        raise AssertionError("each retry halves the micro-batch")

    def find_micro_batch_size(
        self,
        loader: UpdateLoader = MISSING,
        loss_fn: LossFn = MISSING,
        *,
        embed: Embed | None = None,
    ) -> int:
        """Search the largest micro-batch that fits, and take it; all else stays as it was.

        Each trial runs two micro-batches of the next update, with the room for the optimizer's
        state taken, and drops them. On a CPU set a limit first (`memory_limit`): without one the
        system kills a process that takes too much.

        Args:
            loader: what `prepare` returned; its next update stays the next one.
            loss_fn: as for `update`.
            embed: as for `update`; the loss gets as many rows as an update has.

        Raises:
            InputError: under ZeRO-3 or FSDP2.
            RunFailed: not even one group fits.
        """
        transaction = self._ready()
        arguments.check_search(loader)
        arguments.check_loss_fn(loss_fn)
        loss_fn = self._coupled(loss_fn, embed, trial=True)
        if not transaction.sharding.droppable:
            raise failures.not_searched()
        transaction.sharding.reserve()
        update, unit, device = loader.peek(), self.plan.group_size, self.accelerator.device

        def fits(size: int) -> bool:
            recut = update.recut
            assert recut is not None

            def two() -> MicroBatches:
                return islice(recut(size), 2)

            try:
                return not transaction.attempt(update, two, loss_fn).out_of_memory
            finally:
                transaction.drop()

        most = replace(
            self.plan, micro_batch_size=self.plan.num_groups(update.num_samples) * unit
        ).largest_micro_batch(update.num_samples)
        found = largest_that_fits(fits, unit=unit, most=most)
        if found is None:
            raise failures.nothing_fits(self.plan, device, update=update.index + 1)
        self._adaptive.ask(replace(self.plan, micro_batch_size=found))
        loader.set_micro_batch_size(found)
        return found

    def _coupled(self, loss_fn: LossFn, embed: Embed | None, *, trial: bool = False) -> LossFn:
        """The loss with the function of its embeddings, where there is one."""
        if embed is None:
            return loss_fn
        transaction = self._ready()
        if transaction.units is not None:
            raise failures.no_noise_scale_of_embeddings()
        if isinstance(transaction.sharding, ZeroSharding) and not transaction.sharding.droppable:
            raise failures.not_coupled()
        return coupled(loss_fn, embed, trial=trial)

    def _ready(self) -> Transaction:
        if self._transaction is None:
            raise failures.not_prepared()
        if self._transaction.sharding.half_stepped:
            raise failures.half_stepped()
        return self._transaction

    def _cut(self, update: Update) -> MicroBatches:
        """The update in micro-batches of the size that memory allows; its loader follows."""
        if update.recut is None:
            return update.micro_batches
        size = self.plan.micro_batch_size
        if update.loader is not None:
            update.loader.set_micro_batch_size(size)
        return update.recut(size)

    def _shrink(self, update: Update) -> None:
        """Take the next smaller micro-batch after memory ran out, or say what to try."""
        if update.recut is None:
            raise failures.not_recut(self.plan)
        device = self.accelerator.device
        note = self._adaptive.shrink(update=update.index + 1, num_samples=update.num_samples)
        if note is None:
            raise failures.nothing_fits(self.plan, device, update=update.index + 1)
        announce(note, speak=self.accelerator.is_main_process)

    def request_stop(self, reason: Stop = "interrupt") -> None:
        """Ask for the run's end from any rank: `UpdateResult.stop` then tells all of them."""
        check_choice("reason", reason, choices=STOPS)
        if self._stop_requested != "interrupt":
            self._stop_requested = reason

    def _count(
        self, update: Update, agreement: Agreement, step: Step, *, num_retries: int
    ) -> UpdateResult:
        """Move counters, scheduler, average and the micro-batch's size; what became of it all."""
        dropped = step.outcome == "dropped"
        if step.outcome != "skipped":
            self.num_updates += 1
            self.samples_seen += update.num_samples
            if self._scheduler is not None:
                after_update(self._scheduler, dropped=dropped)
            if self._ema is not None and not dropped:
                self._ema.update(self._ready().sharding.module)
        if self._guard is not None:
            self._guard.after_update()
        size = self.plan.micro_batch_size
        note = self._adaptive.after_update(short_of_memory=agreement.short_of_memory)
        announce(note, speak=self.accelerator.is_main_process)
        self._tell_passes()
        return UpdateResult(
            applied=step.outcome == "written",
            loss=agreement.loss,
            grad_norm=step.grad_norm,
            num_samples=update.num_samples,
            num_updates=self.num_updates,
            samples_seen=self.samples_seen,
            micro_batch_size=size,
            num_retries=num_retries,
            stop=agreement.stop,
            dropped=dropped,
            sums=agreement.sums,
        )

    def _tell_passes(self) -> None:
        """How BatchNorm over the whole batch runs, the first time and where that changes."""
        line = None if self.passes is None else str(self.passes)
        if line != self._told:
            self._told = line
            announce(line, speak=self.accelerator.is_main_process)

    @contextmanager
    def rehearsing(self) -> Iterator[Transaction]:
        """Inside, an update moves weights and optimizer alone; see `rehearsal`."""
        names = ("_scheduler", "_ema", "_adaptive", "_drops", "noise_scale")
        kept = {name: getattr(self, name) for name in (*names, "num_updates", "samples_seen")}
        self._scheduler = self._ema = self._drops = self.noise_scale = None
        self._adaptive = copy.deepcopy(self._adaptive)
        try:
            yield self._ready()
        finally:
            vars(self).update(kept)

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """The model with all its weights, for evaluation and for saving; every rank enters it.

        Under ZeRO-3 and FSDP2 it is a plain copy with gathered weights.
        """
        return self._ready().sharding.whole()

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's whole state, to be saved and loaded by all ranks together."""
        return self._ready().sharding.optimizer_state()

    def state_dict(self) -> dict[str, Any]:
        """The counters, and the noise scale's averages where they are taken."""
        noise = {} if self.noise_scale is None else {"noise_scale": self.noise_scale.state_dict()}
        return {"num_updates": self.num_updates, "samples_seen": self.samples_seen, **noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters, and the noise scale's averages where both have them."""
        check_state("large_batch", state, "num_updates", "samples_seen")
        self.num_updates = int(state["num_updates"])
        self.samples_seen = int(state["samples_seen"])
        if self.noise_scale is not None and "noise_scale" in state:
            self.noise_scale.load_state_dict(state["noise_scale"])
        if self._guard is not None:
            self._guard.forget()
        if self._transaction is not None:
            self._transaction.sharding.half_stepped = False
