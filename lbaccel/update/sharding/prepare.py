"""Which sharding a prepared model has, and the preparation itself."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError
from lbaccel.update.sharding.fsdp import FullyShard
from lbaccel.update.sharding.optimizer_state import parameters_of
from lbaccel.update.sharding.precision import (
    asks_for_bf16,
    check_precision,
    float32_inside,
    wrap_forward,
)
from lbaccel.update.sharding.replicated import Replicated
from lbaccel.update.sharding.steps import Sharding, skeleton
from lbaccel.update.sharding.zero import ZeroSharding
from lbaccel.update.sharding.zero_config import check_engine, settle_config

BF16 = (
    "bf16: autocast over float32 weights and gradients, as without DeepSpeed (whose own bf16, "
    "which rounds both, is off)"
)


def prepare(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *,
    plan: BatchPlan,
    clip_grad_norm: float | None,
    ema: Any = None,
) -> tuple[Any, Any, Sharding]:
    """Prepare model and optimizer as the accelerator is set up; how updates are run with them.

    A model with `fully_shard` applied stays as it is.

    Raises:
        InputError: the accelerator's plugin was ignored, its configuration contradicts the plan,
            or an average of the weights (`ema`) could not be right.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return _prepare_zero(
            accelerator, model, optimizer, plan=plan, clip_grad_norm=clip_grad_norm, ema=ema
        )
    sharded_before = isinstance(model, FSDPModule)
    if ema is not None and (sharded_before or kind == DistributedType.FSDP):
        raise InputError(
            "an average of the weights (ema, --ema-decay) under FSDP2: no rank holds the weights "
            "to average. Leave it out, or use DDP."
        )
    empty = skeleton(model) if kind == DistributedType.FSDP and not sharded_before else None
    if sharded_before:
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        sharding = FullyShard(
            accelerator, model, optimizer, clip_grad_norm=clip_grad_norm, empty=empty
        )
        return model, optimizer, sharding
    if kind == DistributedType.FSDP:
        raise InputError(
            f"FSDP was asked for, and Accelerate left the model a {type(model).__name__} that is "
            "not sharded. Use fsdp_version: 2, or DDP."
        )
    return (
        model,
        optimizer,
        Replicated(accelerator, model, optimizer, clip_grad_norm=clip_grad_norm),
    )


def _prepare_zero(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    *,
    plan: BatchPlan,
    clip_grad_norm: float | None,
    ema: Any,
) -> tuple[Any, Any, Sharding]:
    plugin: Any = accelerator.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    check_precision(config)
    settled = {"plan": plan, "clip_grad_norm": clip_grad_norm}
    settle_config(config, model, optimizer, **settled)
    stage = int(config["zero_optimization"].get("stage", 0))
    if ema is not None and stage == 3:
        raise InputError(
            "an average of the weights (ema, --ema-decay) under ZeRO-3: no rank holds the weights "
            "to average. Leave it out, or use ZeRO-2."
        )
    if asks_for_bf16(accelerator):
        wrap_forward(model, accelerator)
        accelerator.print(BF16)
    empty = skeleton(model) if stage == 3 else None
    # Accelerate would warn that its own number, which nothing reads here, is another one.
    accelerator.gradient_accumulation_steps = config["gradient_accumulation_steps"]
    given, groups = optimizer, parameters_of(optimizer)
    with float32_inside(config):
        engine, optimizer = accelerator.prepare(model, optimizer)
    check_engine(engine, given, **settled)
    return (
        engine,
        optimizer,
        ZeroSharding(engine, world_size=accelerator.num_processes, empty=empty, groups=groups),
    )
