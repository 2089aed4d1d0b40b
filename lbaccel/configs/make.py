"""The pair of files for a plan: the launcher's YAML and DeepSpeed's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lbaccel.configs.shipped import JSON_FOLDER, YAML_FOLDER
from lbaccel.errors import InputError
from lbaccel.planning.cost.zero_memory import BUCKET, STAGES, Offload
from lbaccel.planning.plan import Plan

WHOLE = 100_000  # elements: smaller tensors stay whole under ZeRO-3


def choose_stage(stage: int | None, offload: Offload, *, world_size: int) -> int:
    """The stage asked for; by default what offload needs, else 1 where something can be divided.

    Raises:
        InputError: offload under a stage that has none.

    >>> choose_stage(None, "none", world_size=1), choose_stage(None, "none", world_size=4)
    (0, 1)
    >>> choose_stage(None, "optimizer", world_size=1)
    2
    """
    allowed = STAGES[offload]
    if stage is None:
        return allowed[0] if offload != "none" else int(world_size > 1)
    if stage not in allowed:
        raise InputError(
            f"--zero {stage} has no --offload {offload}: it goes with ZeRO-"
            f"{' and ZeRO-'.join(map(str, allowed))}. Use --zero {allowed[0]}."
        )
    return stage


def deepspeed_config(stage: int, offload: Offload = "none") -> dict[str, Any]:
    """A DeepSpeed config for any timm model and plan: what depends on them is `auto`.

    >>> deepspeed_config(1)["zero_optimization"]
    {'stage': 1, 'reduce_bucket_size': 5000000}
    """
    config: dict[str, Any] = dict.fromkeys(
        (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ),
        "auto",
    )
    config |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    if offload != "none":
        # or accelerate puts CPU-Adam in the place of your optimizer, without a word
        config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": WHOLE,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    for part, name in (("optimizer", "optimizer"), ("param", "parameters")):
        if name in offload.split("+"):
            zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": True}
    return {**config, "zero_optimization": zero}


def name_of(found: Plan) -> str:
    """Such as resnet50-gbs4096-zero2_offload."""
    offload = {"none": "", "optimizer": "_offload", "optimizer+parameters": "_offload_all"}
    zero = f"zero{found.zero_stage}{offload[found.offload]}"
    return f"{found.model}-gbs{found.batch.global_batch_size}-{zero}"


def pair(found: Plan, lines: Iterator[str]) -> dict[Path, bytes]:
    """Both files by their path: the YAML with the plan in its comments, and the JSON."""
    name = name_of(found)
    launcher = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "use_cpu": False,
        "num_processes": found.batch.world_size,
        "num_machines": 1,
        "machine_rank": 0,
        "deepspeed_config": {
            "deepspeed_config_file": f"{JSON_FOLDER}/{name}.json",
            "zero3_init_flag": False,
        },
    }
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    text = comments + yaml.safe_dump(launcher, sort_keys=False)
    offload: Any = found.offload
    assert found.zero_stage is not None
    config = json.dumps(deepspeed_config(found.zero_stage, offload), indent=2) + "\n"
    return {
        Path(YAML_FOLDER) / f"{name}.yaml": text.encode(),
        Path(JSON_FOLDER) / f"{name}.json": config.encode(),
    }


def launch_command(found: Plan, *, img_size: int | None = None) -> str:
    """The line that runs the plan, from the folder that holds the files."""
    flags: dict[str, Any] = {
        "data": "folder:PATH",
        "model": found.model,
        "img-size": img_size,
        "global-batch-size": found.batch.global_batch_size,
        "micro-batch-size": found.micro_batch_size,
        "norm-batch-size": found.batch.norm_batch_size,
        "optimizer": found.optimizer,
        "precision": found.precision,
        "activation-checkpointing": found.activation_checkpointing,
        "memory-format": found.memory_format,
    }
    if found.activation_checkpointing == "segments":  # planned again, by the run itself
        flags |= {"activation-checkpointing": "auto", "memory": f"{found.budget_gib:.4g}GiB"}
    if found.activation_offload:
        flags |= {"activation-offload": "auto", "memory": f"{found.budget_gib:.4g}GiB"}
    said = " ".join(f"--{key} {value}" for key, value in flags.items() if value is not None)
    config = f"{YAML_FOLDER}/{name_of(found)}.yaml"
    return f"accelerate launch --config_file {config} -m lbaccel.train {said}"
