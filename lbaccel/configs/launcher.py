"""The launch that `accelerate launch` derives from a YAML, its command line and the environment."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import clear_environment, patch_environment

from lbaccel.documents import Malformed, yaml_in
from lbaccel.errors import InputError

Who = Literal["JSON", "YAML", "command line", "environment", "code", "accelerate", "plan"]


@dataclass(frozen=True)
class ResolvedValue:
    """One key: what it is in the end, who says so, and whom that overrules."""

    key: str
    value: Any
    decided_by: str
    over: str = ""


@dataclass(frozen=True)
class Launch:
    """One launch: its processes, the variables they find, and where each value is from."""

    distributed_type: str
    world_size: int  # processes that are started, whatever num_processes says
    variables: Mapping[str, str]  # ACCELERATE_*, FSDP_* of each process
    origins: Mapping[str, Who]  # variable -> who set it
    rows: tuple[ResolvedValue, ...]
    problems: tuple[str, ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)  # the YAML's deepspeed_config


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML that accelerate's own loader takes, as it is written.

    Raises:
        InputError: no file, no YAML, or keys that accelerate refuses.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file. `lbaccel configs ls` lists those that are shipped.")
    try:
        raw = yaml_in(path)  # accelerate reads it a second time, without these bounds
    except Malformed as error:
        raise InputError(f"{path} is no YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no keys. Start from `lbaccel configs cp single_gpu`.")
    if raw.get("distributed_type") is False:
        raise InputError(
            f"{path}: distributed_type is false: a bare NO is YAML's false. "
            "Type distributed_type: 'NO'."
        )
    try:
        load_config_from_file(str(path))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: accelerate refuses it: {error}") from error
    return raw


def launch(path: Path, *, flags: Sequence[str] = (), environment: Mapping[str, str]) -> Launch:
    """Ask accelerate's launcher what it would start; nothing is started.

    Args:
        path: the YAML.
        flags: of `accelerate launch`, such as ("--num_processes", "4").
        environment: variables that are set before it.

    Raises:
        InputError: a file or a flag that accelerate refuses.
    """
    raw = read_yaml(path)
    arguments, fields = _arguments(path, flags, environment)
    given: set[str] = set(getattr(arguments, "nondefault", ()))
    kind = _kind(arguments)
    starts = kind != "NO" or getattr(arguments, "mpirun_hostfile", None)
    count = int(arguments.num_processes or 1)
    world_size = count if starts else 1
    variables = _variables(arguments, kind, environment, fields)
    set_here = _variables(arguments, kind, {}, fields)
    origins: dict[str, Who] = {}
    for name in variables:
        if name not in set_here:
            origins[name] = "environment"
        else:
            flag = _flag(name)
            block = raw.get("deepspeed_config") or {}
            in_yaml = flag in raw or flag in block
            origins[name] = "command line" if flag in given else "YAML" if in_yaml else "accelerate"
    problems: list[str] = []
    if count > world_size:
        cpu = "use_cpu is true: " if raw.get("use_cpu") else ""
        problems.append(
            f"num_processes is {count}, but accelerate starts 1 process: {cpu}distributed_type "
            f"{raw['distributed_type']} has no launcher. Use torchrun --nproc_per_node {count} for "
            "ranks on a CPU, or distributed_type: MULTI_GPU with use_cpu: false."
        )
    return Launch(
        distributed_type=kind,
        world_size=world_size,
        variables=variables,
        origins=origins,
        rows=tuple(_rows(raw, arguments, given, kind, world_size)),
        problems=tuple(problems),
        block=raw.get("deepspeed_config") or {},
    )


def _arguments(
    path: Path, flags: Sequence[str], environment: Mapping[str, str]
) -> tuple[Any, list[str]]:
    """The launcher's arguments, and the keys that a YAML's deepspeed_config gives."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    said = io.StringIO()
    line = [*flags, "--config_file", str(path), "script.py"]
    try:
        with _hermetic(environment), contextlib.redirect_stderr(said):
            found: Any = _validate_launch_command(launch_command_parser().parse_args(line))
    except SystemExit as error:
        reason = (said.getvalue().strip().splitlines() or ["?"])[-1]
        raise InputError(f"accelerate launch {' '.join(flags)}: {reason}") from error
    except ValueError as error:
        raise InputError(f"accelerate launch refuses {path}: {error}") from error
    arguments, config, precision_from_yaml = found
    fields: list[str] = [*(config.deepspeed_config or ())]
    return arguments, [*fields, *["mixed_precision"] * precision_from_yaml]


@contextlib.contextmanager
def _hermetic(environment: Mapping[str, str]) -> Iterator[None]:
    """No variable but these, and none of accelerate's warnings of values it fills in."""
    logger = logging.getLogger("accelerate.commands.launch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with clear_environment(), patch_environment(**environment):
            yield
    finally:
        logger.setLevel(level)


def _kind(arguments: Any) -> str:
    """The kind of launch that `launch_command` starts: --cpu overrides every launcher."""
    if not arguments.cpu:
        if arguments.use_deepspeed:
            return "DEEPSPEED"
        if arguments.use_fsdp:
            return "FSDP"
        if arguments.multi_gpu:
            return "MULTI_GPU"
    return "NO"


def _variables(
    arguments: Any, kind: str, environment: Mapping[str, str], fields: list[str]
) -> dict[str, str]:
    """The variables that accelerate's own function puts into the environment of a process."""
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    asked = copy.copy(arguments)
    asked.main_process_port = 0  # any: the YAML's may be taken, and nothing is started
    asked.mpirun_hostfile = None
    with _hermetic(environment):
        if kind == "DEEPSPEED":
            asked.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, found = prepare_deepspeed_cmd_env(asked)
        elif kind == "NO":
            _, found = prepare_simple_launcher_cmd_env(asked)
        else:
            found = prepare_multi_gpu_env(asked)
    kept = ("ACCELERATE_", "FSDP_")
    return {name: str(value) for name, value in found.items() if name.startswith(kept)}


FLAGS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
}


def _flag(variable: str) -> str:
    """The launcher's name of a variable.

    >>> _flag("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"), _flag("FSDP_VERSION")
    ('offload_param_device', 'fsdp_version')
    """
    if variable in FLAGS:
        return FLAGS[variable]
    name = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_")
    return name.lower()


def _rows(
    raw: Mapping[str, Any], arguments: Any, given: set[str], kind: str, world_size: int
) -> Iterator[ResolvedValue]:
    yield ResolvedValue(
        "distributed_type", kind, "YAML" if kind == raw["distributed_type"] else "launcher"
    )
    blocks = ("deepspeed_config", "fsdp_config")
    flat = {k: v for k, v in raw.items() if k not in (*blocks, "distributed_type")}
    for block in blocks:
        flat |= raw.get(block) or {}
    for key, written in flat.items():
        value = getattr(arguments, key, written)
        if key == "num_processes" and value != world_size:
            yield ResolvedValue(key, world_size, "launcher", f"{value} (YAML)")
        elif key in given:
            over = f"{written} (YAML)" if written != value else ""
            yield ResolvedValue(key, value, "command line", over)
        else:
            yield ResolvedValue(key, written, "YAML")
    for key in sorted(given & {"num_processes", "mixed_precision"} - set(flat)):
        yield ResolvedValue(key, getattr(arguments, key), "command line")
