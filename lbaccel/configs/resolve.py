"""A DeepSpeed config as accelerate resolves it: every `auto`, and who wins where two disagree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedPlugin, clear_environment, patch_environment

from lbaccel.configs.claims import ScriptArguments, row
from lbaccel.configs.launcher import Launch, ResolvedValue
from lbaccel.configs.refusals import BATCH_KEYS, HIDDEN_SIZE_KEYS, flat, refused, unfit
from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError, check_whole


@dataclass(frozen=True)
class Resolved:
    """The config that `deepspeed.initialize` gets, row by row, and what is wrong with it."""

    config: Mapping[str, Any]
    rows: tuple[ResolvedValue, ...]
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
        found = json_in(path)
    except Malformed as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object. `lbaccel configs cp zero2` copies one.")
    return found


def resolve(
    config: Mapping[str, Any] | None,
    script: ScriptArguments,
    *,
    world_size: int,
    launch: Launch | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """The config that accelerate hands to DeepSpeed; accelerate's own plugin fills in a copy.

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
    ...     ScriptArguments(micro_batch_size=32, gradient_accumulation_steps=4), world_size=2)
    >>> found.batch
    (32, 4, 256)
    """
    check_whole("micro_batch_size", script.micro_batch_size)
    check_whole("gradient_accumulation_steps", script.gradient_accumulation_steps)
    check_whole("world_size", world_size)
    variables = dict(environment or {}) if launch is None else dict(launch.variables)
    variables.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)  # it is `config`
    given = flat(config or {})
    problems = list(unfit(given))
    try:
        with clear_environment(), patch_environment(**variables):
            plugin = DeepSpeedPlugin(
                hf_ds_config=None if config is None else dict(config), **script.plugin
            )
            precision = script.mixed_precision or variables.get("ACCELERATE_MIXED_PRECISION", "no")
            plugin.set_mixed_precision(precision)
    except (ValueError, TypeError) as error:
        problems.append(refused(error, launch))
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
        row(key, value, config, script, variables, launch, world_size)
        for key, value in flat(found).items()
    )
    return Resolved(found, rows, tuple(problems))


def _fill(
    plugin: DeepSpeedPlugin,
    script: ScriptArguments,
    accelerators: int,
    world_size: int,
    problems: list[str],
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
        problems.append(refused(error, None))
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
