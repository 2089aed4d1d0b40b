"""The errors of a DeepSpeed config, each with the line to type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lbaccel.configs.launcher import Launch

HIDDEN_SIZE_KEYS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
PRECISION_KEYS = {"bf16.enabled": "bf16", "fp16.enabled": "fp16"}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their long names.

    >>> flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def unfit(given: Mapping[str, Any]) -> Iterator[str]:
    """The errors that the JSON has by itself."""
    for key in HIDDEN_SIZE_KEYS:
        if given.get(key) == "auto":
            name = key.split(".")[-1]
            size = 100_000 if name.endswith("threshold") else 5_000_000
            yield (
                f'"{name}": "auto" asks for model.config.hidden_size, and timm models have no '
                f'.config: prepare() stops with "Can\'t find `model.config` entry". '
                f'Type "{name}": {size}.'
            )
    for key in BATCH_KEYS:
        value = given.get(key, "auto")
        if value != "auto" and (type(value) is not int or value < 1):
            yield (
                f'"{key}": {json.dumps(value)} is no whole number of at least 1. '
                f'Type "{key}": "auto".'
            )
    for block in ("optimizer", "scheduler"):
        if any(key.split(".")[0] == block for key in given):
            yield (
                f"the JSON has a block {block!r}, and the script makes its own: accelerate refuses "
                f"the two together. Take {block!r} out of the JSON."
            )
    clipping = given.get("gradient_clipping", "auto")
    if clipping != "auto" and (isinstance(clipping, (bool, str)) or clipping < 0):
        yield (
            f'"gradient_clipping": {json.dumps(clipping)} is no number from 0 on. '
            'Type "gradient_clipping": 0.0 for none, or "auto".'
        )
    for key in PRECISION_KEYS:
        value = given.get(key, "auto")
        if value != "auto" and not isinstance(value, bool):
            yield f'"{key}" is {json.dumps(value)}. Type true, false or "auto".'
    if given.get("bf16.enabled") is True and given.get("fp16.enabled") is True:
        yield 'bf16 and fp16 are both enabled. Type {"enabled": "auto"} for both.'


REFUSED = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
    "mixed_precision",
)


def refused(error: Exception, launch: Launch | None) -> str:
    """The message of accelerate's error, with the line to type."""
    text = " ".join(str(error).split())
    if "will be ignored" in text and launch is not None:
        fields = launch.variables.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
        names = [name for name in fields if name in REFUSED]
        where = {"mixed_precision": "--mixed_precision on the command line, or bf16 in the JSON"}
        hints = "; ".join(f"{n}: {where.get(n, 'the JSON')}" for n in names)
        return (
            f"the YAML has {', '.join(names)} beside deepspeed_config_file: accelerate stops at "
            f"it. Take it out of the YAML. Its place: {hints}."
        )
    if "not found in kwargs" in text:
        key = text.split("`")[1]
        name = key.split(".")[-1]
        return f'"{name}": "auto" ({key}): nobody fills it in. Type a value for "{name}".'
    if "ZeRO optimization config" in text:
        return 'the JSON has no "zero_optimization". Type "zero_optimization": {"stage": 1}.'
    return f"accelerate refuses the config: {text}"
