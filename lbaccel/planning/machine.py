"""The machine that a plan is for: the device, its memory, how many there are, what is sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError, check_whole
from lbaccel.launch import calibration_file
from lbaccel.planning.cost.devices import GIB, Device, device_at_hand, find_device
from lbaccel.planning.cost.update import Precision
from lbaccel.planning.cost.zero_memory import STAGES, Offload, Zero
from lbaccel.update.failures import no_global_norm
from lbaccel.update.memory.budget import default_budget, parse_memory


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices that are alike and share an update."""

    device: Device
    budget: int  # bytes of each device
    world_size: int
    zero: Zero | None  # without: one process, or DDP
    host_memory: int | None = None  # bytes of the host for each device; None: not said


def machine_of(
    device: str | Device | None,
    *,
    memory: str | int | None,
    host_memory: str | int | None = None,
    world_size: int,
    zero: Zero | None,
) -> Machine:
    """The machine that `plan` describes by these arguments.

    Raises:
        InputError: an unknown device, text that is no amount of memory, no whole world size.
    """
    check_whole("world_size", world_size)
    if isinstance(device, str):
        device = find_device(device, calibration_file())
    elif device is None:
        device = device_at_hand()
    if isinstance(host_memory, str):
        host_memory = parse_memory(host_memory)
    elif host_memory is not None:
        check_whole("host_memory", host_memory)
    return Machine(
        device=device,
        budget=_budget(memory, device),
        world_size=world_size,
        zero=zero,
        host_memory=host_memory,
    )


def zero_of(
    stage: int | None, offload: Offload, *, bucket_size: int, precision: Precision
) -> Zero | None:
    """DeepSpeed's part, if any.

    Raises:
        InputError: a stage that there is not, offload without a stage or with another, fp16.
    """
    if stage is None:
        if offload != "none":
            raise InputError(
                f"offload={offload!r} is DeepSpeed's. Give zero_stage={STAGES[offload][0]}."
            )
        return None
    if precision == "fp16":
        raise InputError(
            f"precision=fp16 with zero_stage={stage}: lbaccel runs no fp16 under "
            "DeepSpeed. Use bf16, or leave zero_stage out."
        )
    return Zero(stage, offload, bucket_size)


NOTHING_TO_OFFLOAD = (
    "activation offload: none. On a CPU the memory of the host is that of the device, so it would "
    "save nothing"
)


def host_bytes_of(
    machine: Machine, batch: BatchPlan, activation_offload: str, checkpointing: str | None
) -> int:
    """Bytes of the host that the activations of each device may take; 0 where none is offloaded.

    Raises:
        InputError: a word that is none, host memory without offload, or offload with a recompute of
            every block or under ZeRO-3.
    """
    if activation_offload not in ("none", "auto"):
        raise InputError(
            f"activation_offload={activation_offload!r} is neither 'none' nor 'auto'. Use one of "
            "them."
        )
    over_all = batch.norm_batch_size == "global"
    if over_all and activation_offload == "auto":
        raise no_global_norm("activation_offload='auto'")
    if activation_offload == "none":
        if machine.host_memory is not None and not over_all:
            raise InputError(
                f"host_memory={machine.host_memory / GIB:.3g} GiB (--host-memory) is read with "
                "activation_offload='auto' (--activation-offload auto) and norm_batch_size="
                "'global' alone. Add one of them, or leave host_memory out."
            )
        return 0
    if checkpointing == "full":
        raise InputError(
            "activation_offload='auto' with activation_checkpointing='full': the model recomputes "
            "every block by itself, which leaves nothing to offload. Use 'none' or 'auto' for "
            "activation_checkpointing."
        )
    if machine.zero is not None and machine.zero.stage == 3:
        raise InputError(
            "activation_offload='auto' with zero_stage=3: DeepSpeed moves weights in and out of "
            "the tensors that a backward pass keeps, so they are not offloaded. Use ZeRO-0, 1 or 2."
        )
    if machine.device.kind == "cpu":
        return 0
    if machine.host_memory is not None:
        return machine.host_memory
    return default_budget(torch.device("cpu"), ranks=machine.world_size)


def is_at_hand(device: Device) -> bool:
    """Whether this process can measure it."""
    return device.kind == "cpu" or (
        torch.cuda.is_available() and torch.cuda.get_device_name() == device.name
    )


def _budget(memory: str | int | None, device: Device) -> int:
    if isinstance(memory, str):
        return parse_memory(memory)
    if memory is not None:
        return memory
    return device.memory or default_budget(torch.device("cpu"))
