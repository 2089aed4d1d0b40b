"""What the recipe leaves to the planner: `auto` as micro-batch, recompute or memory format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from lbaccel.batch.plan import NormBatchSize
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.planning.cost.calibrate import calibrate
from lbaccel.planning.cost.devices import Device, device_at_hand
from lbaccel.planning.cost.zero_memory import BUCKET, DEEPSPEEDS_BUCKET, STAGES
from lbaccel.planning.estimate import Untraceable
from lbaccel.planning.planner import plan
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.memory.budget import default_budget, parse_memory

Say = Callable[[str], object]
CHOSEN = ("micro_batch_size", "activation_checkpointing", "memory_format")


@dataclass(frozen=True)
class Chosen:
    """The part of a plan that the recipe applies; `micro_batch_size` None: let a search find it."""

    micro_batch_size: int | None
    checkpointing: str  # "none", "full" or "segments"
    segments: tuple[tuple[str, ...], ...]
    memory_format: str


def as_asked(s: Mapping[str, Any]) -> Chosen:
    """What the settings state; where they say "auto", what is done without a plan."""
    return Chosen(
        None if s["micro_batch_size"] == "auto" else s["micro_batch_size"],
        "none" if s["activation_checkpointing"] == "auto" else s["activation_checkpointing"],
        (),
        "contiguous" if s["memory_format"] == "auto" else s["memory_format"],
    )


def wants_plan(s: Mapping[str, Any]) -> bool:
    """Whether the settings leave anything to the planner."""
    return any(s[name] == "auto" for name in CHOSEN)


def choose(
    s: Mapping[str, Any],
    model: nn.Module,
    *,
    accelerator: Any,
    norm_batch_size: NormBatchSize,
    num_samples: int,
    image_shape: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
    say: Say,
) -> Chosen:
    """What stands in the settings, and the planner's choice where they say "auto".

    Rank 0 plans, and all take its plan: what is free may differ between them. A model that can't
    be traced is left to a search by real micro-batches, with a line that says so.
    """
    shared: list[Any] = [None]
    if accelerator.is_main_process:
        shared = [
            _plan(
                s, model, accelerator, norm_batch_size, num_samples, image_shape, dtype, precision
            )
        ]
    chosen, line, error = cast(Any, broadcast_object_list(shared)[0])
    if error is not None:
        raise InputError(error)
    say(line)
    return chosen


def _plan(
    s: Mapping[str, Any],
    model: nn.Module,
    accelerator: Any,
    norm_batch_size: NormBatchSize,
    num_samples: int,
    image_shape: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
) -> tuple[Chosen | None, str, str | None]:
    def make_batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.empty(size, *image_shape, dtype=dtype), torch.zeros(size, dtype=torch.long)

    def asked(name: str) -> Any:
        return None if s[name] == "auto" else s[name]

    device = _device(accelerator.device)
    if s["memory"] is None:
        budget = default_budget(accelerator.device, ranks=local_world_size())
    else:
        budget = parse_memory(s["memory"])
    if s["ema_decay"] is not None:
        budget -= sum(t.nbytes for t in model.state_dict().values())
    try:
        found = plan(
            model,
            global_batch_size=min(s["global_batch_size"], num_samples),
            memory=max(budget, 1) + device.context,  # --memory caps the allocator alone
            world_size=accelerator.num_processes,
            device=device,
            precision=cast(Any, {"fp64": "fp32"}.get(precision, precision)),
            optimizer=s["optimizer"],
            norm_batch_size=norm_batch_size,
            mix_pairs=bool(s["mixup"] or s["cutmix"]),
            clip_grad_norm=s["clip_grad_norm"] is not None,
            micro_batch_size=asked("micro_batch_size"),
            activation_checkpointing=asked("activation_checkpointing"),
            memory_format=asked("memory_format"),
            **_sharding(accelerator),
            make_batch=make_batch,
            observes=False,
            compare=False,
        )
    except Untraceable as error:
        return as_asked(s), f"no plan: {error} Micro-batches are tried out.", None
    except InputError as error:
        return None, "", str(error)
    if not found.fits:
        text = f"no plan fits in the memory: {found.why}."
        return None, "", f"{text} Give more --memory, or a smaller model or image."
    chosen = Chosen(
        found.micro_batch_size, found.activation_checkpointing, found.segments, found.memory_format
    )
    how = {
        "none": "no recompute",
        "full": "every block recomputed",
        "segments": f"{len(found.segments)} segments recomputed",
    }[found.activation_checkpointing]
    line = (
        f"plan: micro-batch {found.micro_batch_size}, {how}, {found.memory_format}; predicted peak "
        f"{found.predicted_peak_gib:.2f} GiB of {found.budget_gib:.2f}"
    )
    return chosen, line, None


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


def apply(model: nn.Module, chosen: Chosen, *, say: Say) -> nn.Module:
    """The model in its memory format, with its recompute."""
    if chosen.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if chosen.checkpointing == "full":
        say(str(apply_activation_checkpointing(model)))
    elif chosen.checkpointing == "segments":
        say(str(apply_segments(model, chosen.segments)))
    return model
