"""Checks of the launcher's YAML and of DeepSpeed's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lbaccel.configs.refusals import HIDDEN_SIZE_KEYS, REFUSED
from lbaccel.doctor.check import Check
from lbaccel.doctor.environment_checks import replaces_optimizer
from lbaccel.doctor.facts import Facts

Cases = Iterator[tuple[str, str]]
LARGE_BUCKET = 100_000_000  # elements


def _unquoted_no(facts: Facts) -> Cases:
    if facts.yaml is not None and facts.yaml.get("distributed_type") is False:
        yield facts.in_yaml("distributed_type"), "distributed_type: NO without quotes"


def _use_cpu(facts: Facts) -> Cases:
    for problem in facts.launch.problems if facts.launch else ():
        yield facts.in_yaml("num_processes"), problem.split(" Use ")[0]


def _beside_json(facts: Facts) -> Cases:
    if "deepspeed_config_file" in facts.block:
        for key in REFUSED:
            if key in facts.block or (key == "mixed_precision" and key in (facts.yaml or {})):
                yield facts.in_yaml(key), f"{key} beside deepspeed_config_file"


def _fsdp_recompute(facts: Facts) -> Cases:
    block = (facts.yaml or {}).get("fsdp_config") or {}
    two = str(block.get("fsdp_version", 1)) == "2"
    if facts.fsdp and two and block.get("fsdp_activation_checkpointing"):
        where = facts.in_yaml("fsdp_activation_checkpointing")
        yield where, "fsdp_activation_checkpointing: true under FSDP2"
    for call in facts.script.calls_of("FullyShardedDataParallelPlugin") if facts.script else ():
        if call.keyword("fsdp_version") == 2 and call.keyword("activation_checkpointing"):
            yield facts.in_script(call.line), "activation_checkpointing=True with fsdp_version=2"


def _fsdp_on_cpu(facts: Facts) -> Cases:
    if facts.fsdp and facts.environment.num_gpus == 0:
        yield facts.in_yaml("distributed_type"), "FSDP, and there is no GPU"


def _zero3_init(facts: Facts) -> Cases:
    if facts.block.get("zero3_init_flag"):
        yield facts.in_yaml("zero3_init_flag"), "zero3_init_flag: true"


def _block_clips(facts: Facts) -> Cases:
    lbaccels = facts.script is not None and facts.script.uses_lbaccel
    bare = facts.json is None and "gradient_clipping" not in facts.block
    if facts.deepspeed and bare and not lbaccels:
        yield facts.in_yaml("deepspeed_config"), "a deepspeed_config without gradient_clipping"


def _json_clips(facts: Facts) -> Cases:
    if facts.script is None or facts.script.uses_lbaccel:
        return  # lbaccel writes clip_grad_norm in the place of "auto"
    if facts.keys.get("gradient_clipping") == "auto":
        found = '"gradient_clipping": "auto"'
        for call in facts.script.on_accelerator("clip_grad_norm_"):
            found += f", and clip_grad_norm_ at line {call.line} does nothing under DeepSpeed"
        yield facts.in_json("gradient_clipping"), found


def _hidden_size(facts: Facts) -> Cases:
    for key in HIDDEN_SIZE_KEYS:
        if facts.keys.get(key) == "auto":
            yield facts.in_json(key), f'"{key.split(".")[-1]}": "auto"'


def _steps(facts: Facts) -> Cases:
    if facts.json is None:
        return
    key = "gradient_accumulation_steps"
    if key not in facts.json:
        yield facts.json_path, f'no "{key}", which means 1'
    elif facts.json[key] != "auto":
        said = facts.script.accumulation_steps if facts.script else None
        against = f", and Accelerator() says {said}" if isinstance(said, int) else ""
        if said != facts.json[key]:
            yield facts.in_json(key), f'"{key}": {json.dumps(facts.json[key])}{against}'


def _optimizer_replaced(facts: Facts) -> Cases:
    if replaces_optimizer(facts):
        where = (
            facts.in_json("offload_optimizer") if facts.json else facts.in_yaml("deepspeed_config")
        )
        yield where, 'offload_optimizer without "zero_force_ds_cpu_optimizer": false'


def _own_bf16(facts: Facts) -> Cases:
    lbaccels = facts.script is not None and facts.script.uses_lbaccel
    if facts.keys.get("bf16.enabled") is True and (facts.has_batch_norm or lbaccels):
        yield facts.in_json("bf16"), '"bf16": {"enabled": true}'


def _bucket(facts: Facts) -> Cases:
    key = "zero_optimization.reduce_bucket_size"
    stage = facts.keys.get("zero_optimization.stage")
    size = facts.keys.get(key, 500_000_000)
    if facts.json is not None and stage in (1, 2, 3) and size != "auto" and size >= LARGE_BUCKET:
        said = f"reduce_bucket_size {size:.3g}" if key in facts.keys else "no reduce_bucket_size"
        yield facts.in_json(key), f"{said}: a buffer of {4 * size / 2**30:.2f} GiB in fp32"


def _recompute_block(facts: Facts) -> Cases:
    if facts.json is not None and "activation_checkpointing" in facts.json:
        yield facts.in_json("activation_checkpointing"), 'a block "activation_checkpointing"'


def _universal(facts: Facts) -> Cases:
    if facts.keys.get("checkpoint.load_universal"):
        yield facts.in_json("load_universal"), '"load_universal": true'


def _one_device(facts: Facts) -> Cases:
    if facts.resolved is None or facts.launch is None or facts.launch.world_size > 1:
        return
    zero = facts.resolved.config.get("zero_optimization", {})
    devices = [zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")]
    if zero.get("stage") in (1, 2, 3) and not {"cpu", "nvme"} & set(devices):
        yield facts.in_yaml("num_processes"), f"ZeRO-{zero['stage']} on one process"


def _unresolved(facts: Facts) -> Cases:
    own = ("hidden_size", "beside deepspeed_config_file")  # checks of their own
    for problem in facts.resolved.problems if facts.resolved else ():
        if not any(word in problem for word in own):
            yield facts.json_path or facts.yaml_path, problem


CHECKS = (
    Check(
        "unquoted-no",
        "YAML reads it as false, and accelerate fails on the type",
        "distributed_type: 'NO'",
        _unquoted_no,
    ),
    Check(
        "one-process-in-silence",
        "one process trains where several were asked for, without a word",
        "torchrun --nproc_per_node N -m lbaccel.train   (several ranks on a CPU)",
        _use_cpu,
    ),
    Check(
        "key-beside-json",
        "accelerate stops with a ValueError",
        "take it out of the YAML; precision: accelerate launch --mixed_precision bf16, the rest: "
        "the JSON",
        _beside_json,
    ),
    Check(
        "fsdp2-recompute",
        "recompute draws other dropout masks: the gradient of a ViT with drop_path 0.3 is wrong by "
        "47 %",
        "fsdp_activation_checkpointing: false, and model.set_grad_checkpointing(True) before "
        "prepare",
        _fsdp_recompute,
    ),
    Check(
        "fsdp2-on-cpu",
        "accelerate 1.15 runs DDP (MULTI_CPU) in its place, without a word",
        "use GPUs, or accelerate_configs/zero3.yaml with DS_ACCELERATOR=cpu",
        _fsdp_on_cpu,
    ),
    Check(
        "zero3-init",
        "it is for transformers' from_pretrained and needs transformers; timm gains nothing",
        "zero3_init_flag: false",
        _zero3_init,
    ),
    Check(
        "block-clips-at-1",
        "it clips at 1.0 in silence: loss 2.2533 where the unclipped run has 2.7864",
        "gradient_clipping: 0.0   (or your value, in deepspeed_config)",
        _block_clips,
    ),
    Check(
        "json-clips-at-1",
        "accelerate fills in 1.0, not your value: loss 2.2533 where the unclipped run has 2.7864",
        '"gradient_clipping": 0.0   (or your value)',
        _json_clips,
    ),
    Check(
        "hidden-size",
        "prepare() stops: Can't find `model.config` entry. timm models have no .config",
        '"reduce_bucket_size": 5000000, "stage3_prefetch_bucket_size": 5000000, '
        '"stage3_param_persistence_threshold": 100000',
        _hidden_size,
    ),
    Check(
        "accumulation-fixed-in-json",
        "DeepSpeed's value wins with a line in the log: asked for 4 steps, train_batch_size was 2 "
        "in place of 8",
        '"gradient_accumulation_steps": "auto"',
        _steps,
    ),
    Check(
        "optimizer-replaced",
        "accelerate puts CPU-Adam in the place of SGD, LARS or LAMB: loss 7.85 after 8 "
        "micro-batches in place of 2.38 (SGD, lr 0.1); with accumulation 4, 20.7 in place of 2.25",
        '"zero_force_ds_cpu_optimizer": false, "zero_allow_untested_optimizer": true',
        _optimizer_replaced,
    ),
    Check(
        "bf16-of-deepspeed",
        "DeepSpeed rounds weights and sums of gradients to 8 bits: one update of a small BatchNorm "
        "network is 15 % off that of autocast (buffers too, 0.8 %, with data_types.buffer_dtype "
        "bf16; without it CPU ranks stop at bf16 weights beside float32 statistics). LargeBatch "
        "refuses it",
        '"bf16": {"enabled": "auto"}, and accelerate launch --mixed_precision bf16: autocast over '
        "float32 weights under LargeBatch",
        _own_bf16,
    ),
    Check(
        "large-bucket",
        "the buffer alone takes more than all states of a ViT-B (0.97 GiB): ZeRO then costs memory "
        "(read, not run)",
        '"reduce_bucket_size": 5000000',
        _bucket,
    ),
    Check(
        "recompute-in-json",
        "DeepSpeed's engine never reads it for a timm model: no memory is saved",
        "model.set_grad_checkpointing(True), or --activation-checkpointing full",
        _recompute_block,
    ),
    Check(
        "universal-checkpoint",
        "it reads exp_avg and exp_avg_sq unconditionally: SGD with momentum fails (read, not run)",
        "take it out; lbaccel's checkpoints go into any stage and world size",
        _universal,
    ),
    Check(
        "zero-on-one-device",
        "there is one shard: no stage divides anything",
        "accelerate launch --config_file accelerate_configs/single_gpu.yaml ...   (or "
        "--num_processes N)",
        _one_device,
    ),
    Check(
        "unresolved",
        "accelerate or DeepSpeed stops at it",
        "lbaccel configs validate FILE...",
        _unresolved,
    ),
)
