"""The errors of an update that cannot go on, each with its numbers and the line to type."""

from __future__ import annotations

import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import Diverged, InputError, RunFailed
from lbaccel.update.memory.adaptive import what_to_try


def not_prepared() -> InputError:
    """An update before `prepare`."""
    return InputError(
        "update() came before prepare(): model, optimizer, loader = "
        "large_batch.prepare(model, optimizer, loader)."
    )


def prepared_before() -> InputError:
    """A second `prepare`, which would put another model in the place of the first."""
    return InputError(
        "prepare() was called before: a LargeBatch runs the updates of one model. Build another "
        "for the second, large_batch = LargeBatch(accelerator, plan, ...), and call its prepare()."
    )


def read_before() -> InputError:
    """An update whose micro-batches are an iterator that was read, and that can't be made anew."""
    return InputError(
        "this update has no micro-batch left: it was iterated before, and nothing makes it anew. "
        "Hand large_batch.update each item of the loader once, and don't iterate it yourself."
    )


def half_stepped() -> RunFailed:
    """An update after a step that failed half way."""
    return RunFailed(
        "an earlier optimizer step failed half way, so the weights are not those of any "
        "update. Load a checkpoint (model, optimizer and this object's state) first."
    )


def not_finite(loss: float, grad_norm: float, *, num_updates: int, samples_seen: int) -> Diverged:
    """A loss or a gradient of inf or nan, without a scaler that expects it."""
    return Diverged(
        f"the loss is {loss} and the gradient's norm {grad_norm} at update "
        f"{num_updates + 1} after {samples_seen} samples. Nothing of this "
        "update was written. A lower learning rate, a longer warmup or clip_grad_norm "
        "usually help."
    )


def overflow(scale: float, *, num_updates: int) -> Diverged:
    """A gradient that overflows in fp16 whatever the loss scale."""
    return Diverged(
        f"the fp16 gradient overflows at update {num_updates + 1} even at loss scale "
        f"{scale:g}: the loss itself is not finite. Use bf16 or fp32, or a "
        "lower learning rate."
    )


def state_does_not_fit(error: Exception) -> RunFailed:
    """No room for the optimizer's state, before the first update."""
    return RunFailed(
        f"the optimizer's state does not fit beside the weights ({error}). Use an "
        "optimizer with less state (SGD: one copy of the weights, AdamW: two), a "
        "smaller model, or a device with more memory."
    )


def step_ran_out(plan: BatchPlan, *, num_updates: int) -> RunFailed:
    """Memory ran out where half of the weights may be written."""
    return RunFailed(
        f"memory ran out inside the optimizer's step of update {num_updates + 1}: "
        "some weights may have moved and others not, so it is not repeated. Go on from "
        "the last checkpoint with a smaller micro-batch, such as "
        f"{max(plan.group_size, plan.micro_batch_size // 2)}."
    )


def not_recut(plan: BatchPlan) -> RunFailed:
    """Memory ran out in an update that the user cut."""
    return RunFailed(
        "memory ran out, and this update can't be cut into smaller micro-batches: it did "
        "not come from an UpdateLoader. Use one, or build a plan with micro_batch_size="
        f"{max(plan.group_size, plan.micro_batch_size // 2)}."
    )


def nothing_fits(plan: BatchPlan, device: torch.device, *, update: int) -> RunFailed:
    """Not even one group of samples fits."""
    used = ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        used = f" ({peak:.2f} GiB at the peak, the device has {total:.2f})"
    fresh = ""
    if device.type == "cpu":
        fresh = (
            " A library that was refused memory may fail for as long as its process lives: a fresh "
            f"start with --micro-batch-size {plan.group_size} (micro_batch_size={plan.group_size}) "
            "may fit."
        )
    return RunFailed(
        f"memory ran out in update {update}{used}, and {what_to_try(plan)}{fresh} "
        "Weights and statistics are as before the update."
    )


def not_searched() -> InputError:
    """A search by trial where a rank that runs out of memory would leave the others waiting."""
    return InputError(
        "a micro-batch can't be searched by trial under ZeRO-3 and FSDP2: ranks meet in every "
        "forward, so one that runs out of memory would leave the others waiting. Give "
        "--micro-batch-size a number (lbaccel plan computes one)."
    )


def not_dropped() -> InputError:
    """Loss dropout where ranks meet within micro-steps."""
    return InputError(
        "loss dropout under ZeRO-3 and FSDP2: gradients are reduced in every micro-step there and "
        "can't be let go. Use ZeRO-0 to 2 or DDP."
    )


def no_noise_scale_of_embeddings() -> InputError:
    """A noise scale where no micro-batch has a gradient of its own."""
    return InputError(
        "noise_scale= with embed=: the noise scale compares the gradients of single micro-batches, "
        "and a loss on the embeddings of the whole batch has none. Use LargeBatch(..., noise_scale="
        "None)."
    )


def not_coupled() -> InputError:
    """Two passes where DeepSpeed counts on a backward pass after each forward."""
    return InputError(
        "embed= under ZeRO-3: its hooks expect a backward pass after each forward, and the first "
        "of the two passes has none. Use ZeRO-2, DDP or FSDP2."
    )


def no_noise_scale(*, preconditioned: bool) -> InputError:
    """No rank sees a micro-batch's whole gradient, or the whole of Adam's moments."""
    if preconditioned:
        return InputError(
            "the preconditioned noise scale under DeepSpeed or FSDP2: a rank holds a part of the "
            "optimizer's second moments. Use --noise-scale plain (preconditioned=False), or DDP."
        )
    return InputError(
        "the noise scale under ZeRO-3 and FSDP2: gradients are reduced and cut up within each "
        "micro-step, so no rank sees a micro-batch's whole. Use --noise-scale none "
        "(noise_scale=None), or ZeRO-2 or DDP."
    )


def no_global_norm(what: str) -> InputError:
    """BatchNorm over the whole batch with what its passes can't repeat or don't have."""
    return InputError(
        f"norm_batch_size='global' with {what}: its passes run the network level by level, over "
        "all samples. Leave that out, or take a number for norm_batch_size (--norm-batch-size 32)."
    )
