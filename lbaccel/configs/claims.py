"""Who decides a key of a DeepSpeed config: the first in accelerate's order that has a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbaccel.configs.launcher import Launch, ResolvedValue
from lbaccel.configs.refusals import PRECISION_KEYS, flat

# DeepSpeed's key: argument of DeepSpeedPlugin, variable, accelerate's own value
PLUGIN_KEYS: dict[str, tuple[str, str, Any]] = {
    "gradient_accumulation_steps": (
        "gradient_accumulation_steps",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        None,
    ),
    "gradient_clipping": ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", 1.0),
    "zero_optimization.stage": ("zero_stage", "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2),
    "zero_optimization.offload_optimizer.device": (
        "offload_optimizer_device",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "none",
    ),
    "zero_optimization.offload_param.device": (
        "offload_param_device",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "none",
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "zero3_save_16bit_model",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ScriptArguments:
    """The values that the script itself sets, in its loader and in its Accelerator.

    `plugin` holds the arguments of a `DeepSpeedPlugin` that the script makes.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    mixed_precision: str | None = None
    plugin: Mapping[str, Any] = field(default_factory=dict)


def row(
    key: str,
    value: Any,
    config: Mapping[str, Any] | None,
    script: ScriptArguments,
    variables: Mapping[str, str],
    launch: Launch | None,
    world_size: int,
) -> ResolvedValue:
    """Who decides a key: the first in accelerate's order that has a value, over the others."""
    claims = _claims(key, config, script, variables, launch)
    if key == "train_batch_size" and flat(config or {}).get(key, "auto") == "auto":
        return ResolvedValue(key, value, f"micro-batch x accumulation x {world_size} ranks")
    if not claims:
        return ResolvedValue(key, value, "accelerate")
    (winner, _), *rest = claims
    losers = [
        f"{other} ({who})"
        for who, other in rest
        if str(other) != str(value) and who != "accelerate"
    ]
    return ResolvedValue(key, value, winner, ", ".join(losers))


def _claims(
    key: str,
    config: Mapping[str, Any] | None,
    script: ScriptArguments,
    variables: Mapping[str, str],
    launch: Launch | None,
) -> Sequence[tuple[str, Any]]:
    """(who, value) in the order in which accelerate asks: JSON, code, variables, its own."""
    given = flat(config or {})
    claims: list[tuple[str, Any]] = []
    if given.get(key, "auto") != "auto":
        claims.append(("JSON", given[key]))
    elif key == "gradient_accumulation_steps" and config is not None and key not in given:
        claims.append(("accelerate: it is not in the JSON", 1))
    if key in PLUGIN_KEYS:
        argument, variable, default = PLUGIN_KEYS[key]
        if script.plugin.get(argument) is not None:
            claims.append(("code: DeepSpeedPlugin", script.plugin[argument]))
        if variable in variables and variables[variable] != "auto":
            claims.append((_set_by(variable, launch), variables[variable]))
        if key == "gradient_accumulation_steps":
            claims.append(("code: Accelerator", script.gradient_accumulation_steps))
        elif default is not None and not claims:
            claims.append(("accelerate", default))
    if key == "train_micro_batch_size_per_gpu":
        claims.append(("code: the loader", script.micro_batch_size))
    if key in PRECISION_KEYS:
        if script.mixed_precision is not None:
            claims.append(("code", script.mixed_precision == PRECISION_KEYS[key]))
        precision = variables.get("ACCELERATE_MIXED_PRECISION")
        if precision is not None:
            who = _set_by("ACCELERATE_MIXED_PRECISION", launch)
            claims.append((who, precision == PRECISION_KEYS[key]))
    return claims


def _set_by(variable: str, launch: Launch | None) -> str:
    who = "environment" if launch is None else launch.origins.get(variable, "environment")
    return f"environment: {variable}" if who == "environment" else who
