"""The planner's part in a run: `auto` as micro-batch, recompute, offload or memory format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lbaccel.batch.plan import NormBatchSize
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.planning.cost.calibrate import calibrate
from lbaccel.planning.cost.devices import Device, device_at_hand
from lbaccel.planning.cost.zero_memory import BUCKET, DEEPSPEEDS_BUCKET, STAGES
from lbaccel.planning.estimate import Untraceable
from lbaccel.planning.machine import NOTHING_TO_OFFLOAD
from lbaccel.planning.measure import predicted_peaks
from lbaccel.planning.plan import Plan
from lbaccel.planning.planner import plan
from lbaccel.recipe.accelerator import zero_stage
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_training import OptimizerOptions
from lbaccel.runs.ranks import decided
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.memory.budget import default_budget, parse_memory
from lbaccel.update.offload import apply_activation_offload

Say = Callable[[str], object]


@dataclass(frozen=True)
class Chosen:
    """The part of a plan that the recipe applies; `micro_batch_size` None: let a search find it."""

    micro_batch_size: int | None
    checkpointing: str  # "none", "full" or "segments"
    segments: tuple[tuple[str, ...], ...]
    memory_format: str
    predicted_peak_gib: float | None = None  # of the allocator; None where nothing predicted it
    offload: tuple[tuple[str, ...], ...] = ()  # runs of blocks whose activations lie on the host
    host_gib: float = 0.0  # that they pin there, predicted


def as_asked(batch: BatchOptions) -> Chosen:
    """The plan that the settings state; where they say "auto", the one without a planner."""
    asked, recompute = _asked(batch.micro_batch_size), _asked(batch.activation_checkpointing)
    return Chosen(asked, recompute or "none", (), _asked(batch.memory_format) or "contiguous")


def _asked(value: Any) -> Any:
    return None if value == "auto" else value


def wants_plan(batch: BatchOptions) -> bool:
    """Whether the settings leave anything to the planner."""
    of_plan = (batch.micro_batch_size, batch.activation_checkpointing, batch.memory_format)
    return "auto" in (*of_plan, batch.activation_offload)


def with_offload_settled(batch: BatchOptions, accelerator: Any, *, say: Say) -> BatchOptions:
    """The settings without offload where it can do nothing, with a line that says so.

    Raises:
        InputError: weights are moved in and out of what a backward pass keeps.
    """
    if batch.activation_offload == "none":
        return batch
    sharded = "FSDP" if accelerator.distributed_type == DistributedType.FSDP else ""
    sharded = "ZeRO-3" if zero_stage(accelerator) == 3 else sharded
    if sharded:
        raise InputError(
            f"--activation-offload {batch.activation_offload} under {sharded}, which moves weights "
            "in and out of the tensors that a backward pass keeps. Use DDP or ZeRO-0 to 2, or "
            "leave --activation-offload out."
        )
    if accelerator.device.type != "cpu":
        return batch
    say(NOTHING_TO_OFFLOAD)
    return replace(batch, activation_offload="none")


@dataclass(frozen=True)
class Workload:
    """The parts of the run's update that the planner needs."""

    model: nn.Module
    optimizer: OptimizerOptions
    largest_batch: int  # samples an update that the run may come to
    norm_batch_size: NormBatchSize
    mix_pairs: bool
    image_shape: tuple[int, int, int]
    dtype: torch.dtype
    precision: str
    teacher: nn.Module | None = None  # that answers each micro-batch too

    def make_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Images and labels of so many samples, without content."""
        images = torch.empty(size, *self.image_shape, dtype=self.dtype)
        return images, torch.zeros(size, dtype=torch.long)


def choose(batch: BatchOptions, work: Workload, accelerator: Any, *, say: Say) -> Chosen:
    """The plan in the settings, with the planner's choice where they say "auto".

    Rank 0 plans, and all take its plan: what is free may differ between them. A model that can't
    be traced is left to a search by real micro-batches, with a line that says so.

    Raises:
        InputError: no plan fits.
    """
    chosen, line = decided(accelerator, lambda: _plan(batch, work, accelerator))
    say(line)
    return chosen


def _plan(batch: BatchOptions, work: Workload, accelerator: Any) -> tuple[Chosen, str]:
    device = _device(accelerator.device)
    if batch.memory is None:
        budget = default_budget(accelerator.device, ranks=local_world_size())
    else:
        budget = parse_memory(batch.memory)
    if work.optimizer.ema_decay is not None:
        budget -= sum(t.nbytes for t in work.model.state_dict().values())
    try:
        found = plan(
            work.model,
            global_batch_size=work.largest_batch,
            memory=max(budget, 1) + device.context,  # --memory caps the allocator alone
            world_size=accelerator.num_processes,
            device=device,
            precision=cast(Any, {"fp64": "fp32"}.get(work.precision, work.precision)),
            optimizer=work.optimizer.optimizer,
            norm_batch_size=work.norm_batch_size,
            host_memory=batch.host_memory,
            mix_pairs=work.mix_pairs,
            clip_grad_norm=work.optimizer.clip_grad_norm is not None,
            micro_batch_size=_asked(batch.micro_batch_size),
            activation_checkpointing=_asked(batch.activation_checkpointing),
            activation_offload=cast(Any, batch.activation_offload),
            memory_format=_asked(batch.memory_format),
            **_sharding(accelerator),
            make_batch=work.make_batch,
            teacher=work.teacher,
            observes=False,
            compare=False,
        )
    except Untraceable as error:
        return as_asked(batch), f"no plan: {error} Micro-batches are tried out."
    if not found.fits:
        raise InputError(
            f"no plan fits in the memory: {found.why}. Give more --memory, or a smaller model or "
            "image."
        )
    how = {
        "none": "no recompute",
        "full": "every block recomputed",
        "segments": f"{len(found.segments)} segments recomputed",
    }[found.activation_checkpointing]
    chosen = Chosen(
        found.micro_batch_size,
        found.activation_checkpointing,
        found.segments,
        found.memory_format,
        predicted_peaks(found)[0],
        found.activation_offload,
        found.host_gib,
    )
    if batch.activation_offload == "auto":
        how += f", {_offloaded(found)}"
    line = (
        f"plan: micro-batch {found.micro_batch_size}, {how}, {found.memory_format}; predicted peak "
        f"{found.predicted_peak_gib:.2f} GiB of {found.budget_gib:.2f}"
    )
    return chosen, line


def _offloaded(found: Plan) -> str:
    if not found.activation_offload:
        return "nothing offloaded"
    count = sum(map(len, found.activation_offload))
    return f"{count} modules offloaded ({found.host_gib:.2f} GiB of the host)"


def _sharding(accelerator: Any) -> dict[str, Any]:
    """DeepSpeed's stage, offload and bucket, as `plan` takes them; nothing without it."""
    plugin = accelerator.deepspeed_plugin
    if plugin is None:
        return {}
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    moved = [
        name
        for name, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
        if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    bucket_size = zero.get("reduce_bucket_size", DEEPSPEEDS_BUCKET)
    stage, offload = int(zero.get("stage", 0)), "+".join(moved) or "none"
    if stage not in STAGES.get(offload, ()):  # one that no plan knows: as if all stayed
        offload = "none"
    return {
        "zero_stage": stage,
        "offload": offload,
        "reduce_bucket_size": BUCKET if bucket_size == "auto" else int(bucket_size),
    }


def _device(device: torch.device) -> Device:
    """The device's rates: calibrated, of the table, or, for a card that is in neither, measured."""
    try:
        return device_at_hand(device)
    except InputError:
        return calibrate(device, seconds=3.0)


def apply(
    model: nn.Module, chosen: Chosen, *, norm_batch_size: NormBatchSize, say: Say
) -> nn.Module:
    """The model in its memory format, with its recompute and its offload."""
    if norm_batch_size == "global" and (chosen.checkpointing != "none" or chosen.offload):
        say(
            "warning: activation checkpointing and offload do nothing with --norm-batch-size "
            "global: a pass holds the activations of one micro-batch between two BatchNorm layers "
            "and computes them itself. A smaller --micro-batch-size takes less memory."
        )
    if chosen.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if chosen.checkpointing == "full":
        say(str(apply_activation_checkpointing(model)))
    elif chosen.checkpointing == "segments":
        say(str(apply_segments(model, chosen.segments)))
    if chosen.offload:
        say(str(apply_activation_offload(model, chosen.offload)))
    return model
