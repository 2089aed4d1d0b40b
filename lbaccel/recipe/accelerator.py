"""The recipe's Accelerator, and the precision that it runs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from lbaccel.doctor.build_locks import SHARED_MEMORY, check_build_locks
from lbaccel.errors import InputError
from lbaccel.launch import asks_for_deepspeed, rank
from lbaccel.update.sharding.precision import check_precision

NAMES = {"fp32": "no", "fp64": "no"}  # Accelerate's, where they differ


def make_accelerator(precision: str | None) -> tuple[Accelerator, str]:
    """The launcher's Accelerator and "fp32", "bf16", "fp16" or "fp64".

    On CPU ranks under DeepSpeed the backend has to be named.

    Args:
        precision: as for `--precision`; None is what the launcher says.

    Raises:
        InputError: the launcher or the DeepSpeed JSON says another precision, or one that can't
            be had; or a killed build of an operator of DeepSpeed's blocks this start.
    """
    on_cpu = not _has_accelerator()
    asked = None if precision is None else NAMES.get(precision, precision)
    if not asks_for_deepspeed():
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=asked)
    else:
        # before anything of DeepSpeed waits for it
        warning = check_build_locks([SHARED_MEMORY] if on_cpu else [])
        if warning is not None and rank() == 0:
            print(warning, file=sys.stderr)
        handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
        accelerator = Accelerator(mixed_precision=asked, kwargs_handlers=handlers)
        plugin: Any = accelerator.deepspeed_plugin
        found = accelerator.mixed_precision
        if asked not in (None, found):
            raise InputError(
                f"--precision {precision}, and the DeepSpeed JSON says {found}. Write "
                '"auto" for "enabled" in its sections "bf16" and "fp16", or take them out.'
            )
        check_precision(plugin.deepspeed_config)
    found = accelerator.mixed_precision
    precision = precision or {"no": "fp32"}.get(found, found)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            "the launcher's mixed_precision: fp16 needs a GPU: there is none. Use --precision bf16 "
            "or fp32."
        )
    return accelerator, precision


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's stage; 0 without DeepSpeed too."""
    plugin: Any = accelerator.deepspeed_plugin
    config = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    return int(config.get("stage", 0))


def _has_accelerator() -> bool:
    """Whether there is a device to train on; Apple's MPS has no float64, which the sums need."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"
