"""The measured cost of a plan: one update of its first micro-steps on this device."""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.data.loader import Update
from lbaccel.errors import InputError, RunFailed, check_whole
from lbaccel.optim.optimizers import create_optimizer
from lbaccel.planning.cost.devices import GIB, device_at_hand
from lbaccel.planning.cost.update import MakeBatch, classification_loss
from lbaccel.planning.plan import Plan
from lbaccel.runs.environment import processor
from lbaccel.update.accumulation import LossFn
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.engine import LargeBatch
from lbaccel.update.memory.budget import default_budget
from lbaccel.update.offload import apply_activation_offload

LR = 1e-6  # the cost of a step does not depend on it, and the loss stays finite
MOST_WARM_UPS = 20  # fp16's scaler halves its scale until the gradient is finite


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement; the context of the CUDA runtime is in neither peak."""

    peak_allocated_gib: float  # tensors and workspaces, weights included
    peak_reserved_gib: float | None  # that torch's CUDA allocator held; None on a CPU
    seconds_per_micro_step: float  # with the copy of its data to the device
    commit_seconds: float  # once an update: norm, clipping, step
    num_micro_steps: int  # that were timed
    device: str
    how: str

    def seconds_per_update(self, plan: Plan) -> float:
        """Of all micro-steps of `plan`: steps x seconds_per_micro_step + commit_seconds."""
        steps = plan.gradient_accumulation_steps
        return steps * self.seconds_per_micro_step + self.commit_seconds


def predicted_peaks(plan: Plan) -> tuple[float, float | None]:
    """GiB of `plan` to lay beside a measurement: allocated, and reserved (None on a CPU)."""
    reserved = plan.predicted_peak_gib - plan.breakdown.get("context", 0.0)
    if plan.device.kind == "cpu":
        return reserved, None
    return reserved - plan.breakdown.get("allocator", 0.0), reserved


def measure(
    plan: Plan,
    model: nn.Module,
    make_batch: MakeBatch,
    *,
    loss_fn: LossFn = classification_loss,
    optimizer: str,
    clip_grad_norm: float | None = 1.0,
    num_micro_steps: int = 2,
) -> Measured:
    """Run two real updates of the first micro-steps of `plan`, and see what they cost.

    A copy of `model` is trained, so nothing of the caller's changes: weights, buffers, modes, the
    random state and Accelerate's state are as before. On CUDA the peaks are the allocator's over
    both updates, and CUDA events time the second. On a CPU the memory events of torch's profiler
    are summed over the first, weights and buffers added, and the second is timed without the
    profiler: in seconds of the process with one thread, where a busy neighbour does not count,
    else by the clock.

    Args:
        plan: what `lbaccel.plan` gave, for one process and for the device at hand.
        model: the network that was planned, unwrapped and with weights.
        make_batch: number of samples -> a micro-batch with values, such as `random_images`.
        loss_fn: (model, micro-batch) -> loss, as `LargeBatch.update` takes it.
        optimizer: a name of timm's.
        clip_grad_norm: as for `LargeBatch`.
        num_micro_steps: of the timed update; the plan's own number is the most there is.

    Raises:
        InputError: another device than the one at hand, several processes, float16 on a CPU, more
            memory than the host has free, or a model without weights.
        RunFailed: the device has not the memory, or the loss is not finite.

    >>> from lbaccel import plan
    >>> from lbaccel.models import create_backbone
    >>> from lbaccel.planning.network import random_images
    >>> found = plan("resnet10t", img_size=64, global_batch_size=64, memory="1GiB", device="cpu",
    ...              num_classes=10, micro_batch_size=32, compare=False)
    >>> model = create_backbone("resnet10t", num_classes=10)
    >>> measured = measure(found, model, random_images(3, 64), optimizer="sgd")
    >>> 0.98 < measured.peak_allocated_gib / predicted_peaks(found)[0] < 1.02
    True
    """
    check_measurable(plan)
    check_whole("num_micro_steps", num_micro_steps)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise InputError(
            f"the weights of {type(model).__name__} lie on the meta device, which has none. Build "
            "the model on a device that computes."
        )
    on_cuda = plan.device.kind == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    with _own_state(), torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.manual_seed(0)
        before = _clean(device)
        run = _Run(
            plan,
            model,
            make_batch,
            loss_fn=loss_fn,
            optimizer=optimizer,
            clip_grad_norm=clip_grad_norm,
            num_micro_steps=num_micro_steps,
            device=device,
        )
        with _profiled(on_cuda) as profiler:
            applied = run.update(run.warm_up)
        for _ in range(MOST_WARM_UPS if not applied else 0):
            if run.update(run.warm_up):
                break
        micro, commit = run.timed()
        if profiler is None:
            peak = torch.cuda.max_memory_allocated(device) - before[0]
            reserved = torch.cuda.max_memory_reserved(device) - before[1]
        else:
            peak, reserved = run.held + _peak_of(profiler), None
    clock = "process time" if run.clock is time.process_time else "clock"
    found = Measured(
        peak_allocated_gib=peak / GIB,
        peak_reserved_gib=None if reserved is None else reserved / GIB,
        seconds_per_micro_step=micro,
        commit_seconds=commit,
        num_micro_steps=run.num_micro_steps,
        device=hardware_name(device),
        how=(
            "torch.cuda.max_memory_allocated and max_memory_reserved; CUDA events"
            if on_cuda
            else f"torch.profiler's memory events, weights and buffers added; {clock}, "
            f"{torch.get_num_threads()} threads"
        ),
    )
    del run
    _clean(device)
    return found


def check_measurable(plan: Plan) -> None:
    """Stop where `plan` can't be measured in this process, on this machine.

    Raises:
        InputError: see `measure`.
    """
    device, batch = plan.device, plan.batch
    if plan.zero_stage is not None:
        raise InputError(
            f"zero_stage={plan.zero_stage}: one process without DeepSpeed is measured. Leave "
            "--zero out; docs/results/zero_memory.md has measured peaks under each stage."
        )
    if device.kind == "cuda":
        here = device_at_hand().name if torch.cuda.is_available() else "cpu"
        if here != device.name:
            raise InputError(
                f"the plan is for {device.name}, and the device at hand is {here}: what a plan "
                "costs is measured on the device that it is for. Run this there, or plan for this "
                f"one: --device {here!r}."
            )
    if batch.world_size > 1:
        share = -(-batch.global_batch_size // batch.world_size)
        raise InputError(
            f"world_size={batch.world_size}: one process is measured, without the buckets of "
            f"several. Use --world-size 1 --global-batch-size {share}."
        )
    if device.kind == "cpu":
        if plan.precision == "fp16":
            raise InputError("precision=fp16 runs on a GPU alone. Use --precision bf16.")
        free = default_budget(torch.device("cpu")) / GIB
        if plan.predicted_peak_gib > free:
            raise InputError(
                f"the plan needs {plan.predicted_peak_gib:.2f} GiB, and this host has {free:.2f} "
                f"to give. Plan for that: --memory {free:.2f}GiB."
            )


class _Run:
    """A copy of the network in a `LargeBatch`, as the plan has it."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        make_batch: MakeBatch,
        *,
        loss_fn: LossFn,
        optimizer: str,
        clip_grad_norm: float | None,
        num_micro_steps: int,
        device: torch.device,
    ) -> None:
        self.plan, self.device, self.make_batch = plan, device, make_batch
        self.num_micro_steps = min(num_micro_steps, plan.gradient_accumulation_steps)
        self.warm_up = min(2, self.num_micro_steps)
        size = plan.micro_batch_size
        self.batch: BatchPlan = replace(plan.batch, global_batch_size=self.num_micro_steps * size)
        self.loss_fn = loss_fn
        trained: Any = copy.deepcopy(model).to(device)
        if plan.memory_format == "channels_last":
            trained = trained.to(memory_format=torch.channels_last)
            self.loss_fn = _turned(loss_fn)
        if plan.activation_checkpointing == "full":
            apply_activation_checkpointing(trained)
        elif plan.activation_checkpointing == "segments":
            apply_segments(trained, plan.segments)
        if plan.activation_offload:
            apply_activation_offload(trained, plan.activation_offload)
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if plan.precision == "fp32" else plan.precision,
        )
        self.large_batch = LargeBatch(accelerator, self.batch, clip_grad_norm=clip_grad_norm)
        steps = create_optimizer(
            trained, optimizer, lr=LR, weight_decay=1e-4, fused=plan.fused_optimizer
        )
        self.model, _, _ = self.large_batch.prepare(trained.train(), steps, [])
        tensors = (*self.model.parameters(), *self.model.buffers())
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        self.held = sum(storage.nbytes() for storage in storages.values())
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self._known: dict[int, Any] = {}
        self._marks: list[tuple[Any, Any]] = []

    def update(self, num_micro_steps: int) -> bool:
        """An update of so many micro-steps; whether it was applied."""
        num_samples = num_micro_steps * self.batch.micro_batch_size

        def micro_batches(size: int | None = None) -> Iterator[tuple[MicroBatch, Any]]:
            if size not in (None, self.batch.micro_batch_size):
                raise RunFailed(
                    f"memory ran out at the plan's micro-batch of {self.batch.micro_batch_size}, "
                    f"for which {self.plan.predicted_peak_gib:.2f} GiB were predicted."
                )
            return self._micro_batches(num_samples)

        update = Update(0, num_samples, (), micro_batches)
        return self.large_batch.update(update, self.loss_fn).applied

    def timed(self) -> tuple[float, float]:
        """Seconds of a micro-step and of the commit, of one update."""
        self._marks = []
        self.update(self.num_micro_steps)
        end = self._now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        micro = sum(_seconds(*mark) for mark in self._marks) / len(self._marks)
        return micro, _seconds(self._marks[-1][1], end)

    def _micro_batches(self, num_samples: int) -> Iterator[tuple[MicroBatch, Any]]:
        for micro_batch in self.batch.partition(0, num_samples):
            made = [self._data(micro_batch.num_samples)]
            start = self._now()
            yield micro_batch, made.pop()  # nothing here holds the data of a micro-step
            self._marks.append((start, self._now()))

    def _data(self, num_samples: int) -> Any:
        """On the host; for a GPU pinned, and made once, as loaders of several workers keep up."""
        if self.device.type == "cpu":
            return self.make_batch(num_samples)
        if num_samples not in self._known:
            self._known[num_samples] = tree_map_only(Tensor, _pinned, self.make_batch(num_samples))
        return self._known[num_samples]

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    return start.elapsed_time(end) / 1e3


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def _turned(loss_fn: LossFn) -> LossFn:
    """The loss on images that are turned on the device, as the recipe does."""

    def turn(t: Tensor) -> Tensor:
        return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t

    return lambda model, micro_batch: loss_fn(model, tree_map_only(Tensor, turn, micro_batch))


@contextmanager
def _profiled(on_cuda: bool) -> Iterator[Any]:
    if on_cuda:
        yield None
        return
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.__enter__()
    try:
        yield profiler
    finally:
        with _quiet():
            profiler.__exit__(None, None, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Kineto writes to the process's error stream that it starts, stops and finds no GPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_of(profiler: Any) -> int:
    """Most bytes live above the start of the profile."""
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _clean(device: torch.device) -> tuple[int, int]:
    """Let go of what nobody holds, and set the peaks back; bytes allocated and reserved now."""
    gc.collect()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # else an earlier product's is not in the peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


@contextmanager
def _own_state() -> Iterator[None]:
    """A fresh Accelerate, whose state is one for the process: the caller's comes back after."""
    shared: list[dict[str, Any]] = [
        state._shared_state for state in (AcceleratorState, GradientState, PartialState)
    ]
    kept = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)


def hardware_name(device: torch.device) -> str:
    """The card, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()
