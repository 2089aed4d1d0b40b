"""What the user's Accelerator must be like for an exact update."""

from __future__ import annotations

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lbaccel.batch import BatchPlan
from lbaccel.errors import InputError


def check_accelerator(accelerator: Accelerator, plan: BatchPlan) -> None:
    """Stop where the accelerator contradicts the plan, or would not do what it says.

    Raises:
        InputError: a distributed type other than one process or DDP, MPS, processes that would not
            talk to each other, another world size, or accumulation of its own.
    """
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
