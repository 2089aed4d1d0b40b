"""The settings of DeepSpeed's JSON: clipping, optimizer, warmup, decay, as DeepSpeed reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbaccel.errors import InputError
from lbaccel.recipe.values import shown, words
from lbaccel.replication.many_gpus import Batch, Curve, Gap, Rate, Translation
from lbaccel.replication.readers.plain import Said

JSON_KEYS = frozenset(
    words(
        """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    optimizer scheduler fp16 bf16 zero_optimization zero_force_ds_cpu_optimizer
    zero_allow_untested_optimizer steps_per_print wall_clock_breakdown communication_data_type
    prescale_gradients gradient_predivide_factor activation_checkpointing comms_logger
    flops_profiler tensorboard wandb csv_monitor dump_state aio
        """
    )
)
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "momentum", "lamb": "lamb", "lion": "lion"}


def number_of(value: Any) -> Any:
    """None for "auto" and for what is not there."""
    return None if value in (None, "auto") else value


def clipping(block: Mapping[str, Any], json: Mapping[str, Any]) -> list[Translation]:
    """The norm that the gradient is clipped to, where DeepSpeed runs: of the YAML or the JSON."""
    if not block and not json:
        return []
    source = json if json else block
    value = source.get("gradient_clipping")
    if value == "auto":
        said, norm, why = "gradient_clipping auto", 1.0, "accelerate's value for auto is 1.0"
    elif value is None and not json:
        said, norm = "no gradient_clipping in the YAML", 1.0
        why = "accelerate's default for a DeepSpeed block is 1.0, without a word"
    elif value is None:
        said, norm, why = "no gradient_clipping", 0.0, "DeepSpeed's default is 0, off"
    else:
        said, norm, why = f"gradient_clipping {shown(value)}", float(value), "of the mean gradient"
    return [Translation(said, "clip_grad_norm", norm or None, why)]


def optimizer_of(
    asked: Mapping[str, Any], said: Said, rows: list[Translation], gaps: list[Gap], origin: str
) -> Rate | None:
    """The JSON's optimizer: its rate, where nothing else was typed; rows and gaps are added to.

    Raises:
        InputError: another optimizer was typed.
    """
    kind, given = str(asked.get("type")), dict(asked.get("params") or {})
    name = OPTIMIZERS.get(kind.lower())
    if said.optimizer is not None:
        raise InputError(
            f"--optimizer {said.optimizer}: {origin} has the optimizer {kind}. Leave it out."
        )
    if name is None:
        gaps.append(Gap(f"optimizer {kind}", "timm.optim has none of that name", "--optimizer"))
    else:
        why = "DeepSpeed's Adam decays as AdamW does" if kind.lower() == "adam" else "the same rule"
        if name == "momentum":
            why = "SGD without Nesterov is timm's momentum"
        rows.append(Translation(f"optimizer {kind}", "optimizer", name, why))
    decay = number_of(given.pop("weight_decay", 0.0))
    if decay is not None and said.weight_decay is None:
        rows.append(
            Translation(f"weight_decay {shown(decay)}", "weight_decay", decay, "the number")
        )
        why = "one group of all parameters: norms and biases decay as well"
        rows.append(Translation("one parameter group", "decay_all", True, why))
    momentum = number_of(given.pop("momentum", 0.0 if name == "momentum" else None))
    if momentum is not None and said.momentum is None:
        rows.append(Translation(f"momentum {shown(momentum)}", "momentum", momentum, "the number"))
    lr = number_of(given.pop("lr", None))
    usual = {"betas": [0.9, 0.999], "eps": 1e-8}
    for key, value in given.items():
        if number_of(value) is not None and list(_seq(value)) != list(_seq(usual.get(key))):
            gaps.append(
                Gap(f"optimizer.params.{key} {shown(value)}", "no setting says it", "its default")
            )
    if lr is None or said.lr is not None:
        return None
    return Rate(said=f"optimizer.params.lr {shown(float(lr))}", lr=float(lr))


def _seq(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def offload_gaps(
    block: Mapping[str, Any], json: Mapping[str, Any], said: Said, gaps: list[Gap]
) -> None:
    """Accelerate replaces the script's optimizer by CPU-Adam where its state is offloaded."""
    zero = json.get("zero_optimization") or {}
    device = (zero.get("offload_optimizer") or {}).get("device")
    device = device or block.get("offload_optimizer_device")
    forced = json.get("zero_force_ds_cpu_optimizer", True)
    if device in ("cpu", "nvme") and forced and not json.get("optimizer"):
        gaps.append(
            Gap(
                "the optimizer that ran: DeepSpeedCPUAdam",
                "accelerate puts it in the place of the script's one where its state is offloaded "
                "and zero_force_ds_cpu_optimizer is not false",
                "--optimizer adamw, if those are the results to meet; else the optimizer that was "
                "meant",
            )
        )


def scheduler_of(
    asked: Mapping[str, Any],
    said: Said,
    batch: Batch,
    num_samples: int | None,
    gaps: list[Gap],
) -> Curve | None:
    """The JSON's scheduler over epochs; None, and a gap, where its steps can't be turned to it."""
    kind, given = str(asked.get("type")), asked.get("params") or {}
    warmup, total = (number_of(given.get(k)) for k in ("warmup_num_steps", "total_num_steps"))
    decay = {"WarmupLR": "none", "WarmupCosineLR": "cosine"}.get(kind)
    said_all = f"scheduler {kind}, {', '.join(f'{k} {shown(v)}' for k, v in given.items())}"
    epochs = said.epochs
    if num_samples is not None and epochs is None and total is not None:
        epochs = total * batch.size / num_samples
    if decay is None or num_samples is None or warmup is None or epochs is None:
        missing = "--num-samples and --epochs turn its steps into epochs"
        gaps.append(
            Gap(
                said_all,
                missing if decay is not None else "lbaccel has no linear decay",
                "a cosine" + (f" over --epochs {shown(said.epochs)}" if said.epochs else ""),
            )
        )
        return None
    if given.get("warmup_type", "log") == "log":
        gaps.append(
            Gap("warmup_type log (DeepSpeed's default)", "lbaccel rises on a line", "gradual")
        )
    by_share = kind == "WarmupCosineLR"
    if by_share and number_of(given.get("cos_min_ratio", 1e-4)):
        least = given.get("cos_min_ratio", 1e-4)
        gaps.append(Gap(f"cos_min_ratio {shown(least)}", "it is a share", "final_lr 0"))
    start = given.get("warmup_min_ratio" if by_share else "warmup_min_lr")
    return Curve(
        said=said_all,
        said_warmup=f"warmup_num_steps {warmup} = {warmup} x {batch.size} / {num_samples} epochs",
        epochs=float(epochs),
        warmup_epochs=warmup * batch.size / num_samples,
        start=float(number_of(start) or 0.0),
        start_is_share=by_share,
        decay=decay,
        per_epoch=False,
    )
