"""A DeepSpeed config as accelerate resolves it: every `auto`, and who wins where two disagree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedPlugin, clear_environment, patch_environment

from lbaccel.configs.launcher import Launch, Row
from lbaccel.errors import InputError, check_whole

HIDDEN_SIZE_KEYS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
PRECISION_KEYS = {"bf16.enabled": "bf16", "fp16.enabled": "fp16"}
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
class Script:
    """What the script itself says: its loader, and the arguments of its Accelerator.

    `plugin` holds the arguments of a `DeepSpeedPlugin` that the script makes.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    mixed_precision: str | None = None
    plugin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """The config that `deepspeed.initialize` gets, row by row, and what is wrong with it."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def batch(self) -> tuple[int, int, int]:
        """(micro-batch, gradient accumulation steps, train batch size) as they came out."""
        micro, steps, train = (self.config[key] for key in BATCH_KEYS)
        return micro, steps, train


def read_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed config.

    Raises:
        InputError: no file, or no JSON object.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is no file; the path in a YAML starts in the folder that you launch from. "
            "`lbaccel configs cp zero2` copies a pair."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object. `lbaccel configs cp zero2` copies one.")
    return found


def resolve(
    config: Mapping[str, Any] | None,
    script: Script,
    *,
    world_size: int,
    launch: Launch | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """What accelerate hands to DeepSpeed; its own plugin does the filling in, on a copy.

    Follows `Accelerator._prepare_deepspeed` of accelerate 1.15, which needs a running Accelerator;
    a test compares the two.

    Args:
        config: of the JSON; None where the YAML's block or the plugin's arguments make one.
        script: what the script says.
        world_size: ranks.
        launch: what the launcher sets, if there is one.
        environment: variables of a script that is started without one.

    Raises:
        InputError: sizes that are none.

    >>> found = resolve(
    ...     {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": "auto",
    ...      "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"},
    ...     Script(micro_batch_size=32, gradient_accumulation_steps=4), world_size=2)
    >>> found.batch
    (32, 4, 256)
    """
    check_whole("micro_batch_size", script.micro_batch_size)
    check_whole("gradient_accumulation_steps", script.gradient_accumulation_steps)
    check_whole("world_size", world_size)
    variables = dict(environment or {}) if launch is None else dict(launch.variables)
    variables.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)  # it is `config`
    given = _flat(config or {})
    problems = list(_unfit(given))
    try:
        with clear_environment(), patch_environment(**variables):
            plugin = DeepSpeedPlugin(
                hf_ds_config=None if config is None else dict(config), **script.plugin
            )
            precision = script.mixed_precision or variables.get("ACCELERATE_MIXED_PRECISION", "no")
            plugin.set_mixed_precision(precision)
    except (ValueError, TypeError) as error:
        problems.append(_refused(error, launch))
        return Resolved({}, (), tuple(problems))
    steps = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    accelerators = script.gradient_accumulation_steps
    if steps is not None:
        if not steps.isdigit():
            problems.append(
                f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps!r} is no whole number, and "
                "Accelerator() stops at it. Type unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
            )
            return Resolved({}, (), tuple(problems))
        accelerators = int(steps)
    _fill(plugin, script, accelerators, world_size, problems)
    found = {k: v for k, v in plugin.deepspeed_config.items() if k != "steps_per_print"}
    rows = tuple(
        _row(key, value, config, script, variables, launch, world_size)
        for key, value in _flat(found).items()
    )
    return Resolved(found, rows, tuple(problems))


def _fill(
    plugin: DeepSpeedPlugin, script: Script, accelerators: int, world_size: int, problems: list[str]
) -> None:
    """The part that accelerate does in `prepare`."""
    if plugin.is_auto("train_micro_batch_size_per_gpu"):
        micro: Any = script.micro_batch_size
    else:
        micro = plugin.get_value("train_micro_batch_size_per_gpu")
    plugin.fill_match(
        "gradient_accumulation_steps", must_match=False, gradient_accumulation_steps=accelerators
    )
    steps: Any = plugin.get_value("gradient_accumulation_steps")
    values: dict[str, Any] = {
        "gradient_clipping": 1.0,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
    }
    if micro is not None:
        values["train_micro_batch_size_per_gpu"] = micro
        # accelerate multiplies a text as a text, and fails at it: told already
        whole = type(micro) is int and type(steps) is int
        values["train_batch_size"] = micro * steps * world_size if whole else "auto"
    for key in HIDDEN_SIZE_KEYS:  # auto is already told
        values[key] = "auto"
    try:
        plugin.deepspeed_config_process(must_match=False, **values)
    except ValueError as error:
        problems.append(_refused(error, None))
    config = plugin.deepspeed_config
    config["zero_allow_untested_optimizer"] = True  # for any torch optimizer
    micro, steps, train = _sizes(config)
    if micro is None and type(train) is int and type(steps) is int:
        micro = config["train_micro_batch_size_per_gpu"] = train // (steps * world_size)
    if train is None and type(micro) is int and type(steps) is int:
        train = config["train_batch_size"] = micro * steps * world_size
    if micro is None or train is None:
        problems.append(
            "DeepSpeed gets neither train_batch_size nor train_micro_batch_size_per_gpu. Type "
            '"train_micro_batch_size_per_gpu": "auto" and "train_batch_size": "auto".'
        )
    elif {type(micro), type(steps), type(train)} == {int} and train != micro * steps * world_size:
        problems.append(
            f"train_batch_size {train} is not {micro} x {steps} x {world_size} = "
            f"{micro * steps * world_size} (micro-batch x accumulation x ranks): DeepSpeed stops "
            'at it. Type "train_batch_size": "auto".'
        )


def _sizes(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    micro, steps, train = (config.get(key) for key in BATCH_KEYS)
    return micro, steps, train


def _unfit(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the JSON by itself."""
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


def _refused(error: Exception, launch: Launch | None) -> str:
    """What accelerate said, with the line to type."""
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


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their long names.

    >>> _flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _row(
    key: str,
    value: Any,
    config: Mapping[str, Any] | None,
    script: Script,
    variables: Mapping[str, str],
    launch: Launch | None,
    world_size: int,
) -> Row:
    """Who decides a key: the first in accelerate's order that has a value, over the others."""
    claims = _claims(key, config, script, variables, launch)
    if key == "train_batch_size" and _flat(config or {}).get(key, "auto") == "auto":
        return Row(key, value, f"micro-batch x accumulation x {world_size} ranks")
    if not claims:
        return Row(key, value, "accelerate")
    (winner, _), *rest = claims
    losers = [
        f"{other} ({who})"
        for who, other in rest
        if str(other) != str(value) and who != "accelerate"
    ]
    return Row(key, value, winner, ", ".join(losers))


def _claims(
    key: str,
    config: Mapping[str, Any] | None,
    script: Script,
    variables: Mapping[str, str],
    launch: Launch | None,
) -> Sequence[tuple[str, Any]]:
    """(who, value) in the order in which accelerate asks: JSON, code, variables, its own."""
    given = _flat(config or {})
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
