"""An update as a transaction: an attempt, what the ranks agree on, and its end.

`Transaction.attempt` adds up gradients and asks all ranks; `Transaction.finish` is the one place
where an update becomes lasting. `LargeBatch` counts, and moves scheduler and average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.data.loader import Update
from lbaccel.errors import InputError, RankFailed, RunFailed
from lbaccel.launch import local_world_size
from lbaccel.noise.scale import NoiseScale
from lbaccel.noise.unit_norms import UnitNorms
from lbaccel.randomness.layouts import NotLearned
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import accumulation, coupled, failures
from lbaccel.update.accumulation import Agreement, LossFn, Scope, Stop
from lbaccel.update.arguments import pairs_of
from lbaccel.update.averages import RunningAverages
from lbaccel.update.compiled import is_compiled
from lbaccel.update.embeddings import Coupled
from lbaccel.update.global_norm.exchange import Exchange
from lbaccel.update.global_norm.passes import GlobalNorm
from lbaccel.update.loss_sums import Sums
from lbaccel.update.mask_layouts import MaskLayouts
from lbaccel.update.memory.budget import default_budget
from lbaccel.update.memory.host_limit import Watch, left_of_budget
from lbaccel.update.memory.oom import allocator_retries, is_out_of_memory, let_go
from lbaccel.update.normalization import GhostNorm
from lbaccel.update.read_twice import ReadTwice
from lbaccel.update.sharding.replicated import Replicated
from lbaccel.update.sharding.steps import MicroBatches, Sharding, Step
from lbaccel.update.writes import WriteWatch


class Transaction:
    """The writes of an update, all or none of them: weights, optimizer state, statistics.

    Args:
        accelerator: its device, scaler and processes are used.
        model: prepared.
        sharding: of the model.
        norm: BatchNorm's statistics of the running update.
        randomness: the draws of the running update.
        units: the norms of its micro-batches' gradients, where the noise scale is measured.
        averages: that forwards move, declared by the user.
        watch: looks once for other tensors that forwards move.
        host_bytes: most that the passes of a `GlobalNorm` may keep on the host.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        sharding: Sharding,
        *,
        norm: GhostNorm,
        randomness: KeyedRandomness,
        units: UnitNorms | None = None,
        averages: RunningAverages | None = None,
        watch: WriteWatch | None = None,
        host_bytes: int | None = None,
    ) -> None:
        self.accelerator, self.model, self.sharding = accelerator, model, sharding
        self.norm, self.randomness, self.units = norm, randomness, units
        self.averages, self.watch = averages or RunningAverages(), watch
        self.masks = MaskLayouts(
            model,
            sharding.module,
            randomness=randomness,
            norm=norm,
            averages=self.averages,
            always=not sharding.droppable,
        )
        self._host_limit = Watch()
        self.global_norm: GlobalNorm | None = None
        if norm.over_all and norm.layers:
            self.global_norm = self._of_the_whole_batch(host_bytes)

    def _of_the_whole_batch(self, host_bytes: int | None) -> GlobalNorm:
        """The way to accumulate where BatchNorm sees all of an update.

        Raises:
            InputError: a part of this update that has no place in it.
        """
        for what, is_there in (
            ("DeepSpeed or FSDP2", not isinstance(self.sharding, Replicated)),
            ("a noise scale, which needs the gradient of each micro-batch", self.units is not None),
            ("averages that a forward moves", bool(self.averages.names)),
            ("a compiled model", is_compiled(self.sharding.module)),
        ):
            if is_there:
                raise failures.no_global_norm(what)
        accelerator = self.accelerator
        exchange = Exchange(accelerator.num_processes, accelerator.device)
        return GlobalNorm(
            self.norm,
            self.randomness,
            device=accelerator.device,
            exchange=exchange,
            host_bytes=self._room_on_host if host_bytes is None else lambda: host_bytes,
        )

    def _room_on_host(self) -> int | None:
        """Bytes for the passes of a `GlobalNorm`: those free, of a CPU half: levels run there too.

        None where the system does not say.
        """
        on_cpu = self.accelerator.device.type == "cpu"
        left = left_of_budget() if on_cpu else None
        if left is None:
            try:
                left = default_budget(torch.device("cpu"), ranks=local_world_size())
            except InputError:
                return None
        return max(0, left // 2 if on_cpu else left)

    def drop(self) -> None:
        """Take back what an attempt left in gradients and statistics."""
        self.sharding.drop()
        self.norm.begin()
        self.averages.forget()

    def attempt(
        self,
        update: Update,
        micro_batches: Callable[[], MicroBatches],
        loss_fn: LossFn,
        *,
        stop: Stop | None = None,
    ) -> Agreement:
        """Add up gradients, and learn whether all ranks could.

        Where memory ran out on some rank, what this rank's attempt holds is let go. Where ranks
        meet within micro-steps (ZeRO-3, FSDP2), a failed rank cannot report: the others are blocked
        in a collective that it never joins. Its end must end them.

        Args:
            update: its index is the key of its draws.
            micro_batches: makes those of this rank, which move to the device one at a time.
            loss_fn: as for `accumulate`, or a `Coupled`.
            stop: this rank wants to end the run after this update.

        Raises:
            Exception: what this rank raised, other than a lack of memory.
            RunFailed: another rank failed, or this one did where ranks meet within micro-steps.
        """
        self.drop()
        self.masks.begin()
        device, world_size = self.accelerator.device, self.accelerator.num_processes
        retries = allocator_retries(device)
        with self.randomness.update(update.index):
            sums, error = None, None
            for again in (False, True, True):  # the second time gives up: there is no third
                sums, error = self._try(micro_batches, loss_fn, update)
                if not (isinstance(error, NotLearned) and self.sharding.droppable):
                    break
                self.masks.forget(error, again=again)
                self.drop()
            if error is not None and not self.sharding.droppable and world_size > 1:
                raise _cut_off(error, self.accelerator.process_index) from error
            agreement = accumulation.agree(
                sums,
                self.sharding.present(),
                world_size=world_size,
                device=device,
                stop=stop,
                short_of_memory=allocator_retries(device) > retries,
                error=error,
            )
            if agreement.out_of_memory:
                let_go(error, device)
        return agreement

    def _try(
        self, make: Callable[[], MicroBatches], loss_fn: LossFn, update: Update
    ) -> tuple[Sums | None, BaseException | None]:
        device = self.accelerator.device
        make, accumulate = self._way(make, loss_fn, update)
        pairs = self._learning(self._on_device(make()), loss_fn)
        if self.watch is not None and not self.watch.done:
            pairs = self.watch.micro_batches(pairs, self.sharding.module, loss_fn)
        self._host_limit.begin()
        try:
            self.averages.begin(self.sharding.module, loss_fn)
            # Weights that each forward gathers anew must not live on in their casts.
            keeps = self.sharding.droppable
            cache = _autocast_cache(device.type) if keeps else nullcontext()
            listening = self.units.collect() if self.units is not None else nullcontext()
            with self.sharding.around(), cache, listening:
                sums = accumulate(
                    self.model,
                    pairs,
                    loss_fn,
                    num_samples=update.num_samples,
                    scopes=self._scopes(),
                    backward=self.sharding.backward,
                )
        except Exception as error:
            return None, error
        self.masks.say()
        return sums, None

    def _scopes(self) -> list[Scope]:
        """Those around each micro-batch, without the ones that have nothing to do."""
        norm, averages, limit = self.norm, self.averages, self._host_limit
        return [
            *([norm] if norm.layers or norm.restored else []),
            self.randomness,
            *([averages] if averages.names else []),
            *([limit] if self.sharding.droppable and limit.is_active else []),
        ]

    def _way(
        self, make: Callable[[], MicroBatches], loss_fn: LossFn, update: Update
    ) -> tuple[Callable[[], MicroBatches], Callable[..., Sums]]:
        """How an attempt makes its micro-batches, and what adds up their gradients."""
        after = None if self.units is None else self.units.add
        if self.global_norm is not None:
            if isinstance(loss_fn, Coupled):
                raise failures.no_global_norm("embed=")
            return make, self._over_all_samples
        if not isinstance(loss_fn, Coupled):
            return make, partial(accumulation.accumulate, after=after)
        twice = ReadTwice(make, once=update.recut is None, sharers=local_world_size())
        return twice, partial(
            coupled.accumulate,
            again=lambda: self._on_device(twice()),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _over_all_samples(self, model: Any, pairs: Any, loss_fn: LossFn, **how: Any) -> Sums:
        """As `accumulate`, by passes; DDP's own forward has no part in them."""
        assert self.global_norm is not None
        del how["scopes"]  # of a forward and its backward, which are not one here
        with self._host_limit.always():
            return self.global_norm.accumulate(self.sharding.module, pairs, loss_fn, **how)

    def _on_device(self, micro_batches: MicroBatches) -> Iterator[tuple[MicroBatch, Any]]:
        device = self.accelerator.device
        for micro_batch, data in self.sharding.micro_steps(pairs_of(micro_batches)):
            there = send_to_device(data, device, non_blocking=True)
            yield micro_batch, self._host_limit.look_at(there)

    def _learning(
        self, pairs: Iterable[tuple[MicroBatch, Any]], loss_fn: LossFn
    ) -> Iterator[tuple[MicroBatch, Any]]:
        """The micro-batches; where masks must be learned, the first shows how."""
        is_first = True
        for micro_batch, data in pairs:
            if is_first:
                self.masks.learn(loss_fn, micro_batch, data)
                is_first = False
            yield micro_batch, data
        if is_first:
            raise failures.read_before()

    def finish(
        self,
        agreement: Agreement,
        update: Update,
        *,
        plan: BatchPlan,
        num_updates: int,
        samples_seen: int,
        noise_scale: NoiseScale | None = None,
        dropped: bool = False,
    ) -> Step:
        """Commit an attempt: reduce, clip and step, then statistics, then the noise scale.

        It is the one place where an update becomes lasting. An update that is dropped moves the
        statistics alone; one that overflowed in fp16 ("skipped") moves nothing but the loss scale.
        The optimizer's step is not undone and not repeated, since half of it may be written.

        Args:
            agreement: of the attempt.
            update: that was attempted.
            plan: the batch.
            num_updates: applied before this one.
            samples_seen: in these.
            noise_scale: takes a written update in.
            dropped: the gradient is let go.

        Raises:
            RunFailed: the loss or the gradient is not finite, memory ran out in the step, or an
                fp16 overflow that no loss scale cures.
        """
        step = Step(math.nan, "dropped")
        if not dropped:
            step = self._step(agreement, update, plan=plan, num_updates=num_updates)
        if step.outcome == "not finite":
            raise failures.not_finite(
                agreement.loss, step.grad_norm, num_updates=num_updates, samples_seen=samples_seen
            )
        if step.outcome in ("written", "dropped"):
            several = self.accelerator.num_processes > 1
            self.norm.commit(accumulation.gather_rows if several else None)
            self.averages.commit(update.num_samples, world_size=self.accelerator.num_processes)
        self.sharding.drop()
        if step.outcome == "written" and noise_scale is not None and self.units is not None:
            noise_scale.add(
                self.units.read(),
                grad_norm=step.grad_norm,
                num_samples=update.num_samples,
                weight=agreement.weight,
                start=samples_seen,
            )
        return step

    def _step(
        self, agreement: Agreement, update: Update, *, plan: BatchPlan, num_updates: int
    ) -> Step:
        """The sharding's step, and in words why it can't go on."""
        # Of the summed gradient: sums of weights over samples.
        divisor = agreement.weight / update.num_samples if agreement.own_weights else 1.0
        scaler = self.accelerator.scaler
        try:
            with self.units.at_step() if self.units is not None else nullcontext():
                step = self.sharding.step(agreement, divisor=divisor)
        except Exception as error:
            if not (self.sharding.half_stepped and is_out_of_memory(error)):
                raise
            raise failures.step_ran_out(plan, num_updates=num_updates) from error
        if step.outcome == "skipped" and scaler is not None and scaler.get_scale() < 1.0:
            raise failures.overflow(scaler.get_scale(), num_updates=num_updates)
        return step


def _cut_off(error: BaseException, rank: int) -> BaseException:
    """The error of a rank that cannot report its failure to the others."""
    if isinstance(error, (InputError, RunFailed)):
        return error
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if is_out_of_memory(error):
        return RankFailed(
            f"memory ran out on rank {rank} ({what}). Under ZeRO-3 and FSDP2 ranks meet in every "
            "forward, so the update can't be done again in smaller micro-batches. Start with a "
            "smaller --micro-batch-size, or use ZeRO-2, which recovers by itself."
        )
    if isinstance(error, torch.distributed.DistError) or "onnection" in what:
        return RankFailed(
            f"rank {rank} lost another rank in the middle of an update ({what}). That rank's own "
            "message says why."
        )
    return RankFailed(
        f"rank {rank} failed in a micro-step ({what}). Under ZeRO-3 and FSDP2 the other ranks "
        "wait for it in a collective, so the run ends."
    )


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
