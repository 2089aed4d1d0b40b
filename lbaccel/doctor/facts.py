"""The inputs of the checks (environment, YAML, JSON, script, plan), and their findings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.configs.claims import ScriptArguments
from lbaccel.configs.launcher import Launch, launch, read_yaml
from lbaccel.configs.refusals import BATCH_KEYS, flat
from lbaccel.configs.resolve import Resolved, read_json, resolve
from lbaccel.doctor.build_locks import stale_locks
from lbaccel.doctor.script import Script
from lbaccel.documents import Malformed, yaml_in
from lbaccel.errors import InputError, reading
from lbaccel.launch import variables
from lbaccel.runs.environment import version

PACKAGES = ("accelerate", "deepspeed", "transformers", "timm", "torch", "torchvision", "ninja")
VARIABLES = ("ACCELERATE_", "FSDP_", "DS_", "WANDB_", "CXX", "CUDA_HOME", "TORCH_EXTENSIONS_DIR")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is known to go wrong: where, its measured consequence, the line to type."""

    check: str
    where: str
    found: str
    consequence: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Environment:
    """This machine, as far as the checks ask."""

    packages: Mapping[str, str | None]  # version; None: not installed
    variables: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int = 0
    compiler: str | None = None
    nvcc: str | None = None
    stale_locks: tuple[str, ...] = ()  # of torch extensions whose build was killed

    def version(self, package: str) -> tuple[int, ...]:
        """Its first three numbers, () where it is not installed.

        >>> Environment(packages={"deepspeed": "0.19.8"}).version("deepspeed")
        (0, 19, 8)
        """
        text = (self.packages.get(package) or "").split("+")[0]
        return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known; what was not given is None."""

    environment: Environment
    yaml_path: str = ""
    yaml: Mapping[str, Any] | None = None
    launch: Launch | None = None  # None too where the launcher refuses the YAML
    json_path: str = ""
    json: Mapping[str, Any] | None = None
    resolved: Resolved | None = None
    script: Script | None = None
    model: str | None = None
    has_batch_norm: bool | None = None  # None: not known

    @property
    def deepspeed(self) -> bool:
        """Whether the run is one of DeepSpeed."""
        return self.json is not None or self._kind == "DEEPSPEED"

    @property
    def _kind(self) -> Any:
        if self.launch is not None:
            return self.launch.distributed_type
        return (self.yaml or {}).get("distributed_type")

    @property
    def fsdp(self) -> bool:
        """Whether the YAML asks for FSDP."""
        return self._kind == "FSDP"

    @property
    def block(self) -> Mapping[str, Any]:
        """The YAML's deepspeed_config."""
        return (self.yaml or {}).get("deepspeed_config") or {}

    @property
    def keys(self) -> Mapping[str, Any]:
        """The JSON's leaves by their long names."""
        return flat(self.json or {})

    def in_yaml(self, key: str) -> str:
        """FILE:LINE of a key."""
        return _line(self.yaml_path, f"{key}:")

    def in_json(self, key: str) -> str:
        """FILE:LINE of a key, or FILE where it is missing."""
        return _line(self.json_path, f'"{key.split(".")[-1]}"')

    def in_script(self, line: int) -> str:
        """FILE:LINE of the script."""
        return f"{self.script.path}:{line}" if self.script else ""


def _line(path: str, start: str) -> str:
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    for number, line in enumerate(lines, 1):
        if line.strip().startswith(start):
            return f"{path}:{number}"
    return path


def this_environment() -> Environment:
    """Versions, compilers and variables of this machine; deepspeed is not imported."""
    found = {package: version(package) for package in PACKAGES}
    if found["ninja"] is None and shutil.which("ninja"):
        found["ninja"] = "on the path"
    known = variables(*VARIABLES)
    compilers = (known["CXX"],) if "CXX" in known else ("c++", "g++", "clang++")
    nvcc = shutil.which("nvcc", path=f"{known['CUDA_HOME']}/bin" if "CUDA_HOME" in known else None)
    return Environment(
        packages=found,
        variables=known,
        num_gpus=torch.cuda.device_count(),
        compiler=next(filter(None, map(shutil.which, compilers)), None),
        nvcc=nvcc,
        stale_locks=tuple(map(str, stale_locks())),
    )


def gather(
    environment: Environment,
    *,
    yaml_path: Path | None = None,
    json_path: Path | None = None,
    script: Script | None = None,
    model: str | None = None,
    has_batch_norm: bool | None = None,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    world_size: int | None = None,
) -> Facts:
    """Read what is given; the JSON that the YAML names is read too.

    The sizes are the plan's; where one is missing, a `train_batch_size` that depends on it is not
    judged. `world_size` is by default the YAML's, else 1.

    Raises:
        InputError: files that can't be read.
    """
    raw, started, config = None, None, None
    if yaml_path is not None:
        raw = _raw(yaml_path)
        if raw.get("distributed_type") is not False:  # a bare NO is a finding, not an error
            read_yaml(yaml_path)
            kept = ("ACCELERATE_", "FSDP_")
            inherited = {k: v for k, v in environment.variables.items() if k.startswith(kept)}
            flags = () if world_size is None else ("--num_processes", str(world_size))
            started = launch(yaml_path, flags=flags, environment=inherited)
        named = (raw.get("deepspeed_config") or {}).get("deepspeed_config_file")
        if json_path is None and named is not None:
            json_path = Path(named)
    if json_path is not None:
        config = read_json(json_path)
    resolved = None
    if config is not None or (started and started.distributed_type == "DEEPSPEED"):
        world = started.world_size if started else world_size or 1
        said, judged = ScriptArguments(micro_batch_size=1, gradient_accumulation_steps=1), config
        if global_batch_size is not None and micro_batch_size is not None:
            plan = BatchPlan(
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                world_size=world,
            )
            steps = plan.gradient_accumulation_steps
            said = ScriptArguments(
                micro_batch_size=micro_batch_size, gradient_accumulation_steps=steps
            )
        elif config is not None and "auto" in map(config.get, BATCH_KEYS[:2]):
            judged = {**config, "train_batch_size": "auto"}
        resolved = resolve(
            judged,
            said,
            world_size=world,
            launch=started,
            environment={},
        )
    return Facts(
        environment=environment,
        yaml_path=str(yaml_path or ""),
        yaml=raw,
        launch=started,
        json_path=str(json_path or ""),
        json=config,
        resolved=resolved,
        script=script,
        model=model,
        has_batch_norm=has_batch_norm,
    )


def _raw(path: Path) -> dict[str, Any]:
    """The YAML as written, before accelerate looks at it."""
    if path.is_file():
        try:
            found = yaml_in(path)
        except Malformed:
            found = None
        if isinstance(found, dict):
            return found
    read_yaml(path)  # says what is wrong
    raise InputError(f"{path} can't be read.")
