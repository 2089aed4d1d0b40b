"""An accelerate YAML with its DeepSpeed JSON, read as accelerate 1.15 resolves them.

The YAML holds the processes, the JSON (or the YAML's DeepSpeed block) accumulation, clipping and
sometimes the optimizer. The per-GPU batch is in a JSON without "auto", or in the script alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lbaccel.errors import InputError
from lbaccel.recipe.values import shown, words
from lbaccel.replication.many_gpus import (
    Batch,
    Gap,
    Rate,
    Recipe,
    Translation,
    one_number_of_gpus,
)
from lbaccel.replication.readers.deepspeed_json import (
    JSON_KEYS,
    clipping,
    number_of,
    offload_gaps,
    optimizer_of,
    scheduler_of,
)
from lbaccel.replication.readers.plain import Said, accumulation_of, curve_of, rows_of

YAML_KEYS = frozenset(
    words(
        """
    compute_environment distributed_type num_processes num_machines machine_rank mixed_precision
    use_cpu debug gpu_ids main_process_ip main_process_port rdzv_backend same_network
    main_training_function enable_cpu_affinity fp8_config deepspeed_config fsdp_config
    parallelism_config megatron_lm_config mpirun_config downcast_bf16 tpu_name tpu_zone
    tpu_use_cluster tpu_use_sudo tpu_vm tpu_env command_file commands dynamo_config
        """
    )
)
BLOCK_KEYS = frozenset(
    words(
        """
    deepspeed_config_file deepspeed_multinode_launcher deepspeed_hostfile
    deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_moe_layer_cls_names
    gradient_accumulation_steps gradient_clipping zero_stage zero3_init_flag zero3_save_16bit_model
    offload_optimizer_device offload_param_device offload_optimizer_nvme_path
    offload_param_nvme_path
        """
    )
)


def is_accelerate_config(content: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is of this kind."""
    return "distributed_type" in content or "compute_environment" in content


def is_deepspeed_config(content: Mapping[str, Any]) -> bool:
    """Whether a JSON mapping is of DeepSpeed's kind."""
    return bool(content.keys() & {"zero_optimization", "train_micro_batch_size_per_gpu"})


def deepspeed_file(content: Mapping[str, Any]) -> str | None:
    """The JSON that the YAML names, if any."""
    return (content.get("deepspeed_config") or {}).get("deepspeed_config_file")


def read_accelerate(
    content: Mapping[str, Any],
    deepspeed: Mapping[str, Any] | None,
    *,
    said: Said,
    gpus: int | None,
    num_samples: int | None,
    origin: str,
) -> Recipe:
    """The recipe in a YAML and its JSON, with what was typed beside them.

    Args:
        content: the YAML; empty where a DeepSpeed JSON was given alone.
        deepspeed: the JSON, if there is one.
        said: what the files do not hold, such as the per-GPU batch.
        gpus: processes, where the YAML does not say so.
        num_samples: of the training set, which turns DeepSpeed's steps into epochs.
        origin: names of the files, for messages.

    Raises:
        InputError: no per-GPU batch anywhere, or numbers that contradict each other.
    """
    block, json = content.get("deepspeed_config") or {}, deepspeed or {}
    number = one_number_of_gpus(gpus, _stated_gpus(content), origin=origin)
    gaps: list[Gap] = []
    said, assumed = _with_batch(said, block, json, gpus=number, origin=origin)
    accumulation, text = accumulation_of(said, gpus=number)
    batch = Batch(
        per_gpu=said.per_gpu_batch or 0,
        gpus=number,
        accumulation=accumulation,
        sync_bn=bool(said.sync_bn),
        said=text,
        last="keep",
        last_why="accelerate's loader keeps the last, short batch and updates at an epoch's end",
    )
    _check_total(json, batch, origin)
    if number > 1:
        gaps.append(
            Gap(
                "even_batches, which repeats samples at an epoch's end",
                "lbaccel takes each sample once",
                "last_update keep",
            )
        )
    if accumulation > 1:
        gaps.append(
            Gap(
                "accelerate's division of an epoch's last group by all accumulation steps",
                "it under-weights a group of k < K micro-batches by k / K",
                "the exact mean of that update's samples",
            )
        )
    rows = [*rows_of(said), *clipping(block, json), *_precision(content, json)]
    _plan_rows(content, block, json, rows)
    rate = None if said.lr is None else Rate(said=f"--lr {shown(said.lr)}", lr=said.lr)
    if json.get("optimizer"):
        rate = optimizer_of(json["optimizer"], said, rows, gaps, origin) or rate
    offload_gaps(block, json, said, gaps)
    curve = curve_of(said)
    if json.get("scheduler"):
        curve = scheduler_of(json["scheduler"], said, batch, num_samples, gaps) or curve
        peak = number_of((json["scheduler"].get("params") or {}).get("warmup_max_lr"))
        if peak is not None:  # DeepSpeed's warmup writes it over the optimizer's
            rate = Rate(said=f"scheduler.params.warmup_max_lr {shown(peak)}", lr=float(peak))
    unknown = [f"{k}: {shown(content[k])}" for k in content if k not in YAML_KEYS]
    unknown += [f"deepspeed_config.{k}: {shown(block[k])}" for k in block if k not in BLOCK_KEYS]
    unknown += [f"{k}: {shown(json[k])} (JSON)" for k in json if k not in JSON_KEYS]
    return Recipe(
        origin=origin,
        model=said.model,
        said_model="" if said.model is None else f"--model {said.model}",
        batch=batch,
        rate=rate,
        curve=curve,
        rows=tuple(rows),
        gaps=tuple(gaps),
        unknown=tuple(unknown),
        assumed=assumed if said.sync_bn is not None else (*assumed, "--sync-bn no"),
    )


def _stated_gpus(content: Mapping[str, Any]) -> dict[str, int]:
    if not content:
        return {}
    if content.get("use_cpu"):  # accelerate launch then starts one process, whatever is asked
        return {"use_cpu: true": 1}
    if content.get("distributed_type") == "NO":
        return {"distributed_type: 'NO'": 1}
    number = content.get("num_processes")
    if isinstance(number, int) and number > 0:
        return {f"num_processes: {number}": number}
    return {}


def _with_batch(
    said: Said, block: Mapping[str, Any], json: Mapping[str, Any], *, gpus: int, origin: str
) -> tuple[Said, tuple[str, ...]]:
    """The typed settings, with the files' per-GPU batch and accumulation; and the assumptions."""
    per_gpu, total = (
        number_of(json.get(key)) for key in ("train_micro_batch_size_per_gpu", "train_batch_size")
    )
    steps = number_of(json.get("gradient_accumulation_steps"))
    if steps is None and not json:
        steps = number_of(block.get("gradient_accumulation_steps"))
    assumed: tuple[str, ...] = ()
    if steps is None and said.accumulation is None and total is None:
        auto = json.get("gradient_accumulation_steps") == "auto"
        if json and not auto:
            why = "DeepSpeed's value where the JSON has none, whatever the Accelerator was given"
            assumed = (f"gradient_accumulation_steps 1: {why}",)
        else:
            assumed = ("gradient_accumulation_steps 1: the Accelerator's, unless the script gives",)
    for name, typed, stated in (
        ("--per-gpu-batch", said.per_gpu_batch, per_gpu),
        ("--accumulation", said.accumulation, steps),
    ):
        if typed is not None and stated is not None and typed != stated:
            raise InputError(
                f"{name} {typed} contradicts {origin}, which has {stated}. Leave {name} out, or "
                "correct the file."
            )
    per_gpu, steps = per_gpu or said.per_gpu_batch, steps or said.accumulation
    if per_gpu is None and total is not None:
        per_gpu, rest = divmod(total, gpus * (steps or 1))
        if rest or not per_gpu:
            raise InputError(
                f"train_batch_size {total} in {origin} is no multiple of {gpus} GPUs x "
                f"{steps or 1} accumulation steps. Correct the file, or --gpus."
            )
    if per_gpu is None:
        raise InputError(
            f"{origin} does not hold the per-GPU batch: accelerate takes it from the script's "
            "DataLoader. Add --per-gpu-batch, the batch_size of that DataLoader."
        )
    return replace(said, per_gpu_batch=per_gpu, accumulation=steps), assumed


def _check_total(json: Mapping[str, Any], batch: Batch, origin: str) -> None:
    total = number_of(json.get("train_batch_size"))
    if total is not None and total != batch.size:
        raise InputError(
            f"train_batch_size {total} in {origin} is not train_micro_batch_size_per_gpu "
            f"{batch.per_gpu} x gradient_accumulation_steps {batch.accumulation} x {batch.gpus} "
            f"GPUs = {batch.size}; DeepSpeed stops there. Correct the file, or --gpus."
        )


def _precision(content: Mapping[str, Any], json: Mapping[str, Any]) -> list[Translation]:
    for name in ("bf16", "fp16"):
        enabled = (json.get(name) or {}).get("enabled")
        if enabled is True:
            why = "DeepSpeed's own rounds the weights too; lbaccel's is autocast over float32 ones"
            return [Translation(f"{name}.enabled true", "precision", name, why)]
    mixed = content.get("mixed_precision")
    if mixed in ("no", False, None):
        return (
            []
            if mixed is None
            else [Translation("mixed_precision 'no'", "precision", "fp32", "as it")]
        )
    if mixed in ("fp16", "bf16"):
        return [
            Translation(f"mixed_precision {mixed}", "precision", mixed, "autocast of the forward")
        ]
    return []


def _plan_rows(
    content: Mapping[str, Any],
    block: Mapping[str, Any],
    json: Mapping[str, Any],
    rows: list[Translation],
) -> None:
    why = "of the plan: where states lie has no effect on the result"
    stage = (json.get("zero_optimization") or {}).get("stage", block.get("zero_stage"))
    if stage is not None:
        rows.append(Translation(f"ZeRO stage {stage}", None, None, why))
    if content.get("fsdp_config"):
        rows.append(Translation("fsdp_config", None, None, why))
