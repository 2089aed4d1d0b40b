"""DeepSpeed's configuration, settled with the plan before `prepare` and checked after it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError, RunFailed

AUTO = "auto"
HIDDEN_SIZE_KEYS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
WITHOUT_HIDDEN_SIZE = (50_000_000, 50_000_000, 100_000)


def settle_config(
    config: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    plan: BatchPlan,
    clip_grad_norm: float | None,
) -> None:
    """Fill each "auto" that the plan or `clip_grad_norm` decides, in place; stop at what differs.

    `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` are the plan's, and
    `train_batch_size` is their product with the world size, which DeepSpeed demands. Where the
    plan is ragged that is more than the global batch; nothing reads it, as the loss is weighed by
    `samples / global_batch_size` here and the samples are counted in `UpdateResult`.

    Args:
        config: the plugin's `deepspeed_config`.
        model: before `prepare`.
        optimizer: before `prepare`.
        plan: the batch.
        clip_grad_norm: as for `LargeBatch`.

    Raises:
        InputError: a number that contradicts the plan, a setting that would change the contract
            in silence, or an optimizer that ZeRO's flat vectors would change.
    """
    zero = config.setdefault("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    _check_sections(config, zero, model, optimizer)
    _settle_batch(config, plan)
    _settle_clipping(config, clip_grad_norm)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}: under "
                "DeepSpeed lbaccel keeps weights and sums gradients in float32. Use float32 "
                "(model.float(), --precision fp32 or bf16), or DDP."
            )
    if stage >= 1:
        check_elementwise(optimizer, stage=stage)


def check_engine(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    *,
    plan: BatchPlan,
    clip_grad_norm: float | None,
) -> None:
    """Assert that what was settled is what DeepSpeed runs.

    Raises:
        RunFailed: the optimizer is not the user's, or a number is not the settled one.
    """
    runs = engine.basic_optimizer
    if runs is not optimizer:
        raise RunFailed(
            f"DeepSpeed runs {type(runs).__name__} where you gave {type(optimizer).__name__}. Set "
            f'"zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON.'
        )
    if set(engine.get_data_types()) != {torch.float32}:
        raise RunFailed(
            f"DeepSpeed keeps weights and gradients in {engine.get_data_types()} where lbaccel "
            "settled float32."
        )
    micro, steps = plan.micro_batch_size, plan.gradient_accumulation_steps
    settled = {
        "train_micro_batch_size_per_gpu": (engine.train_micro_batch_size_per_gpu(), micro),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), steps),
        "train_batch_size": (engine.train_batch_size(), micro * steps * plan.world_size),
        "gradient_clipping": (engine.gradient_clipping(), clip_grad_norm or 0.0),
    }
    for name, (found, wanted) in settled.items():
        if found != wanted:
            raise RunFailed(
                f"DeepSpeed runs {name}={found} where the plan has {wanted} ({plan}). Write "
                f'"{name}": "auto" in the DeepSpeed JSON.'
            )


def _check_sections(
    config: dict[str, Any], zero: dict[str, Any], model: nn.Module, optimizer: Any
) -> None:
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise InputError(
                f'the DeepSpeed JSON has a "{section}" section, and the {section} is the one given '
                f"in code (or by --{'optimizer' if section == 'optimizer' else 'schedule'}). Take "
                "the section out."
            )
    if config.get("managed_gradient_accumulation") is False:
        raise InputError(
            '"managed_gradient_accumulation": false in the DeepSpeed JSON: lbaccel sets the '
            "boundary of each update itself. Take the line out."
        )
    if not hasattr(model, "config"):
        for name, value in zip(HIDDEN_SIZE_KEYS, WITHOUT_HIDDEN_SIZE, strict=True):
            if zero.get(name) == AUTO:
                raise InputError(
                    f'"{name}": "auto" in the DeepSpeed JSON needs model.config.hidden_size, which '
                    f'{type(model).__name__} has not. Write a number: "{name}": {value}.'
                )
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    if device in ("cpu", "nvme") and forced:
        name = type(optimizer).__name__
        if not name.startswith("DeepSpeedCPU"):
            raise InputError(
                f"offload_optimizer to {device}: Accelerate would run DeepSpeedCPUAdam in place of "
                f'{name}, with its learning rate. Write "zero_force_ds_cpu_optimizer": false into '
                f"the DeepSpeed JSON to keep {name}."
            )


def _settle_batch(config: dict[str, Any], plan: BatchPlan) -> None:
    micro, steps = plan.micro_batch_size, plan.gradient_accumulation_steps
    product = micro * steps * plan.world_size
    derived = {
        "train_micro_batch_size_per_gpu": {micro},
        # Accelerate writes 1 where the key is missing, and that is not to be told apart.
        "gradient_accumulation_steps": {steps, 1},
        "train_batch_size": {product, plan.global_batch_size},
    }
    for name, fitting in derived.items():
        given = config.get(name, AUTO)
        if given != AUTO and given not in fitting:
            raise InputError(
                f'"{name}": {given} in the DeepSpeed JSON, and the plan is: {plan}. Write '
                f'"{name}": "auto", or change the plan (--global-batch-size, --micro-batch-size).'
            )
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = steps
    config["train_batch_size"] = product


def _settle_clipping(config: dict[str, Any], clip_grad_norm: float | None) -> None:
    wanted = clip_grad_norm or 0.0
    given = config.get("gradient_clipping", AUTO)
    if given != AUTO and float(given) != wanted:
        flag = f"--clip-grad-norm {given:g}" if given else "no --clip-grad-norm"
        raise InputError(
            f'"gradient_clipping": {given} in the DeepSpeed configuration, and clip_grad_norm='
            f'{clip_grad_norm}. Write "gradient_clipping": "auto" there (lbaccel fills in its own '
            f"value, never Accelerate's 1.0), or say {flag}."
        )
    config["gradient_clipping"] = wanted


def check_elementwise(optimizer: torch.optim.Optimizer, *, stage: int) -> None:
    """Stop at an optimizer that needs to know where one parameter ends and the next begins.

    ZeRO-1 to 3 hand the optimizer one flat vector a group and rank. SGD and Adam treat each
    element by itself; LARS, LAMB, Muon and Adafactor take norms, matrices or means of a whole
    parameter, and would become other methods in silence. Three steps of a copy, on two small
    parameters and on the two as one vector, tell.

    Raises:
        InputError: the two differ.
    """
    shapes = ((3, 4), (5,))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    same, reason = True, ""
    for group in range(len(optimizer.param_groups)):  # timm's LARS adapts where it decays only
        try:
            apart = _run(optimizer, group, values, gradients)
            flat = _run(
                optimizer,
                group,
                [torch.cat([v.flatten() for v in values])],
                [[torch.cat([g.flatten() for g in step])] for step in gradients],
            )
            same &= torch.allclose(apart, flat, rtol=1e-5, atol=1e-7)
        except Exception as error:  # such as Muon, which takes matrices only
            same, reason = False, f" ({type(error).__name__}: {str(error)[:80]})"
    if not same:
        raise InputError(
            f"{type(optimizer).__name__} under ZeRO-{stage}: it treats each parameter as a whole, "
            f"and ZeRO hands it one flat vector, which gives other updates{reason}. Use sgd or "
            'adamw, or keep the optimizer with DDP or "stage": 0.'
        )


def _run(
    optimizer: torch.optim.Optimizer,
    number: int,
    values: list[torch.Tensor],
    gradients: list[list[torch.Tensor]],
) -> torch.Tensor:
    """The elements after steps of a copy of `optimizer`, with the settings of one of its groups."""
    twin = type(optimizer).__new__(type(optimizer))
    memo: dict[int, Any] = {
        id(p): torch.empty(0) for group in optimizer.param_groups for p in group["params"]
    }
    twin.__dict__ = {
        key: copy.deepcopy(value, memo)
        for key, value in optimizer.__dict__.items()
        if "hook" not in key and not callable(value) and key != "state"
    }
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        twin.__dict__[hooks] = {}
    twin.state = type(optimizer.state)(optimizer.state.default_factory)
    parameters = [nn.Parameter(value.clone()) for value in values]
    group = {**twin.param_groups[number], "params": parameters}
    group |= {"lr": 0.1, **{key: False for key in ("fused", "foreach") if key in group}}
    twin.param_groups = [group]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        type(optimizer).step(twin)
    return torch.cat([p.detach().flatten() for p in parameters])
