"""bf16 under DeepSpeed: autocast over float32 weights, as in one process and under DDP.

DeepSpeed's own bf16 and fp16 cast weights, and add up gradients in 16 bits: another method, so
they are refused. Its `torch_autocast` (0.19.8) keeps float32 weights, but gathers them
and sums the gradients of Linear and Conv layers in bf16, so the number of ranks would matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn

from lbaccel.errors import InputError
from lbaccel.launch import deepspeed_config_file

AUTOCAST = (
    'Write "auto" for "enabled" there and ask for it by --precision bf16 (accelerate launch '
    "--mixed_precision bf16, Accelerator(mixed_precision=...)): lbaccel then runs autocast over "
    "float32 weights, as without DeepSpeed."
)
FLOAT32 = (None, "auto", "fp32")


def check_precision(config: Mapping[str, Any]) -> None:
    """Stop at what would round weights, buffers or sums of gradients under DeepSpeed.

    Accelerate has filled in each "auto" by now, so bf16 that the JSON itself asks for is told
    apart only where a launcher names that JSON.

    Args:
        config: the plugin's `deepspeed_config`.

    Raises:
        InputError: fp16, DeepSpeed's own bf16 or autocast, or sums or buffers in 16 bits.
    """
    if _enabled(config, "fp16"):
        raise InputError(
            "fp16 under DeepSpeed: it keeps fp16 weights and a loss scale of its own, where "
            "lbaccel runs autocast over float32 weights. Use bf16 (--precision bf16, and "
            '"enabled": "auto" in the sections "bf16" and "fp16" of the JSON), or fp16 with DDP.'
        )
    named = deepspeed_config_file()
    given: Mapping[str, Any] = {}
    if named is not None:
        from accelerate.utils import HfDeepSpeedConfig  # it is there where deepspeed is

        given = HfDeepSpeedConfig(named).config
    if _enabled(config, "bf16") and _enabled(given, "bf16"):
        raise InputError(
            '"bf16": {"enabled": true} in the DeepSpeed JSON asks for DeepSpeed\'s own bf16: it '
            "rounds weights and sums of gradients to 8 bits, so that DeepSpeed would change the "
            f"result, and checkpoints would hold the rounded weights. {AUTOCAST}"
        )
    if _enabled(config, "torch_autocast"):
        raise InputError(
            '"torch_autocast" in the DeepSpeed JSON sums gradients over the ranks in 16 bits, so '
            "that the number of ranks would change the result. Take the section out; --precision "
            "bf16 (--mixed_precision bf16) runs autocast and sums in float32."
        )
    types = config.get("data_types") or {}
    found = {"communication_data_type": config.get("communication_data_type")}
    found |= {key: types.get(key) for key in ("grad_accum_dtype", "buffer_dtype")}
    for key, value in found.items():
        if value not in FLOAT32:
            raise InputError(
                f'"{key}": "{value}" in the DeepSpeed JSON: lbaccel sums gradients and keeps '
                "buffers in float32. Take it out."
            )


def _enabled(config: Mapping[str, Any], section: str) -> bool:
    return str((config.get(section) or {}).get("enabled", False)).lower() == "true"


def asks_for_bf16(accelerator: Accelerator) -> bool:
    """Whether bf16 was asked for under DeepSpeed, where Accelerate itself runs no autocast."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return deepspeed and accelerator.mixed_precision == "bf16"


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The context of a forward: `accelerator.autocast()`, and its equal under DeepSpeed."""
    if not asks_for_bf16(accelerator):
        return accelerator.autocast()
    handler = accelerator.autocast_handler
    # accelerate 1.15's own context under DeepSpeed has the device's default type: fp16 on CUDA
    return torch.autocast(
        accelerator.device.type,
        dtype=torch.bfloat16,
        **({} if handler is None else handler.to_kwargs()),
    )


def wrap_forward(model: nn.Module, accelerator: Accelerator) -> None:
    """The forward under autocast with float32 outputs, as `accelerator.prepare_model` wraps it."""
    given: Any = model.forward
    model._original_forward = given  # type: ignore[assignment]  # for accelerator.unwrap_model
    context: Any = autocast(accelerator)
    if hasattr(given, "__func__"):  # a copy of the model then runs itself
        model.forward = MethodType(convert_outputs_to_fp32(context(given.__func__)), model)
    else:
        model.forward = convert_outputs_to_fp32(context(given))


@contextmanager
def float32_inside(config: dict[str, Any]) -> Iterator[None]:
    """Inside, DeepSpeed reads float32; outside, `accelerator.mixed_precision` is what was asked."""
    section = config.setdefault("bf16", {})
    asked = section.get("enabled", False)
    section["enabled"] = False
    try:
        yield
    finally:
        section["enabled"] = asked
