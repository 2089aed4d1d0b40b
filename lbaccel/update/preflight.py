"""Checks of the user's Accelerator: the settings that an exact update needs."""

from __future__ import annotations

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError
from lbaccel.launch import asks_for_fsdp

GLOO = 'Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])'


def check_accelerator(accelerator: Accelerator, plan: BatchPlan) -> None:
    """Stop where the accelerator contradicts the plan, or would not do what it says.

    Raises:
        InputError: a distributed type other than one process, DDP, DeepSpeed or FSDP2; a plugin
            that was ignored; MPS; processes that would not talk to each other; another world size,
            or accumulation of its own.
    """
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    _check_kind(accelerator)
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
    if world > processes:
        raise InputError(
            f"DeepSpeed has {world} processes, but Accelerate believes that each is alone. On "
            f"CPU ranks name the backend: {GLOO}."
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


def _check_kind(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    supported = (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    )
    if kind not in supported:
        raise InputError(
            f"distributed_type={kind.value}: lbaccel runs its update in one process, under DDP "
            "(MULTI_GPU, MULTI_CPU), DeepSpeed and FSDP2. Use accelerate_configs/multi_gpu.yaml."
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "FSDP of version 1, which lbaccel does not run. Write fsdp_version: 2 into the "
            "fsdp_config of the accelerate config, or use DDP."
        )
    if kind != DistributedType.FSDP and asks_for_fsdp():
        raise InputError(
            f"FSDP was asked for, and Accelerate ignores it on this machine and runs {kind.value}: "
            "it needs GPUs. Use accelerate_configs/multi_gpu.yaml, ZeRO "
            "(accelerate_configs/zero2.yaml), or torch's fully_shard(model) without the plugin."
        )
