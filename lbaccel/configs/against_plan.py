"""A resolved config beside the plan that it is to run: where they differ, and what to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lbaccel.batch.plan import BatchPlan

if TYPE_CHECKING:
    from lbaccel.configs.launcher import Launch
    from lbaccel.configs.resolve import Resolved


def differences(plan: BatchPlan, batch: tuple[int, int, int]) -> Iterator[str]:
    """Where the config came out as another batch than the plan's."""
    micro, steps, train = batch
    if micro != plan.micro_batch_size:
        yield (
            f"the JSON's micro-batch is {micro}, the plan's {plan.micro_batch_size}. Type "
            '"train_micro_batch_size_per_gpu": "auto", or use --micro-batch-size '
            f"{micro}."
        )
    if steps != plan.gradient_accumulation_steps:
        yield (
            f"gradient_accumulation_steps came out as {steps}, the plan has "
            f"{plan.gradient_accumulation_steps}: updates of {train} samples in place of "
            f"{plan.global_batch_size}, and accelerate only logs it. Type "
            '"gradient_accumulation_steps": "auto" in the JSON, and say '
            f"{plan.gradient_accumulation_steps} nowhere else but in Accelerator()."
        )


def batch_notes(plan: BatchPlan, batch: tuple[int, int, int]) -> Iterator[str]:
    """How `train_batch_size` and the clipping are to be read."""
    *_, train = batch
    if train != plan.global_batch_size:
        yield (
            f"train_batch_size {train} counts full micro-batches; the update has "
            f"{plan.global_batch_size} samples, and lbaccel weighs by samples"
        )
    yield (
        '"gradient_clipping": "auto" is 1.0 in a script of your own; lbaccel.train writes its '
        "--clip-grad-norm there, and 0.0 for none"
    )


def precision_notes(resolved: Resolved) -> Iterator[str]:
    """Where DeepSpeed's bf16 or fp16 is not what lbaccel trains in."""
    rows = {row.key: row for row in resolved.rows}
    bf16, fp16 = rows["bf16.enabled"], rows["fp16.enabled"]
    if bf16.value is True and bf16.decided_by == "JSON":
        yield (
            '"bf16": {"enabled": true} in the JSON is DeepSpeed\'s own, which rounds weights and '
            'sums of gradients: lbaccel refuses it. Type {"enabled": "auto"} there, and '
            "--mixed_precision bf16"
        )
    elif bf16.value is True:
        yield (
            "bf16 in a script of your own: DeepSpeed rounds weights and sums of gradients; under "
            "lbaccel it is autocast over float32 weights, and DeepSpeed is told bf16 false"
        )
    if fp16.value is True:
        yield "lbaccel refuses fp16 under DeepSpeed, which rounds weights. Type bf16 in its place"


def fsdp_problems(started: Launch) -> Iterator[str]:
    """Recompute by FSDP2 itself, which draws other dropout masks."""
    variables = started.variables
    if (
        started.distributed_type == "FSDP"
        and variables.get("FSDP_VERSION") == "2"
        and variables.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
    ):
        yield (
            "fsdp_activation_checkpointing recomputes with other dropout masks under FSDP2: with "
            "drop_path 0.3 the gradient of a ViT is wrong by 47 %. Type "
            "fsdp_activation_checkpointing: false, and --activation-checkpointing full."
        )
