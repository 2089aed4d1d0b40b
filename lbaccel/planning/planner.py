"""`lbaccel.plan`: does this batch fit, and what is the fastest way to fit it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lbaccel.batch.duration import IMAGENET
from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.errors import InputError
from lbaccel.planning.asked import batch_plan, check_pairs, check_teacher, model_arguments
from lbaccel.planning.candidates import MemoryFormat
from lbaccel.planning.cost.devices import GIB, Device
from lbaccel.planning.cost.update import (
    LossFn,
    MakeBatch,
    Network,
    Precision,
    classification_loss,
)
from lbaccel.planning.cost.zero_memory import BUCKET, Offload
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.machine import (
    Machine,
    host_bytes_of,
    machine_of,
    zero_of,
)
from lbaccel.planning.made import Wanted, made
from lbaccel.planning.network import Trained, network_of
from lbaccel.planning.plan import Plan
from lbaccel.planning.search import Pinned, Search
from lbaccel.planning.whole_batch_norm import passes_of, with_passes, without_host
from lbaccel.update.embeddings import Embed


def plan(
    model: str | nn.Module,
    *,
    global_batch_size: int,
    img_size: int | None = None,
    memory: str | int | None = None,
    world_size: int = 1,
    device: str | Device | None = None,
    precision: Precision = "fp32",
    optimizer: str | torch.optim.Optimizer = "sgd",
    norm_batch_size: NormBatchSize = None,
    num_classes: int = 1000,
    model_kwargs: Mapping[str, Any] | None = None,
    mix_pairs: bool = False,
    clip_grad_norm: bool = True,
    micro_batch_size: int | None = None,
    activation_checkpointing: Literal["none", "full"] | None = None,
    activation_offload: Literal["none", "auto"] = "none",
    host_memory: str | int | None = None,
    memory_format: MemoryFormat | None = None,
    zero_stage: int | None = None,
    offload: Offload = "none",
    reduce_bucket_size: int = BUCKET,
    make_batch: MakeBatch | None = None,
    loss_fn: LossFn | None = None,
    embed: Embed | None = None,
    teacher: nn.Module | None = None,
    num_samples: int = IMAGENET,
    epochs: float = 90.0,
    observes: bool = True,
    compare: bool = True,
    sweeps: bool = False,
    say: Callable[[str], object] | None = None,
) -> Plan:
    """The fastest plan for a global batch that fits in `memory`, without running anything.

    Updates are traced on fake tensors: no memory, no device, nothing of the model changes. Where
    nothing fits, `fits` is False and the plan is the nearest one that there is.

    Args:
        model, global_batch_size: a name of timm's or any module; samples an update of all ranks.
        img_size: pixels a side of the images; default: the model's.
        memory: bytes of each device, or text such as "8GiB"; default: the device's, or what is
            free on this host for the CPU.
        world_size: data-parallel processes.
        device: a name such as "RTX 4090" or "cpu"; default: the GPU at hand, else the CPU.
        precision: of the forward pass.
        optimizer: a name of timm's, or an optimizer over the module's parameters.
        norm_batch_size: see `BatchPlan`; by default 32 for a network with BatchNorm.
        num_classes: outputs of a model given by name.
        model_kwargs: arguments of a network given by name, such as {"stem": 8}.
        mix_pairs, clip_grad_norm: see `BatchPlan`; whether the gradient is clipped.
        micro_batch_size, memory_format: pin them; None chooses.
        activation_checkpointing: pins it to no recompute, or to the model's own blocks.
        activation_offload: "auto" lets activations lie on the host, where that fits fastest.
        host_memory: of the host, for each device's offloaded activations, or for what the passes
            of norm_batch_size="global" keep; default: a share of what is free, or all they take.
        zero_stage: plan for DeepSpeed's ZeRO-0 to 3 (no fp16); None: one process, or DDP.
        offload: what DeepSpeed keeps on the host: "optimizer" (ZeRO-2 and 3) or
            "optimizer+parameters" (ZeRO-3). With the CPU as device it counts all the same.
        reduce_bucket_size: elements of DeepSpeed's bucket; default: that of the shipped configs.
        make_batch: number of samples -> a micro-batch, for what is no image classification.
        loss_fn: (model, micro-batch) -> loss, as `LargeBatch.update` takes it.
        embed: as for `LargeBatch.update`; the loss on the rows of the whole batch is counted.
        teacher: a network that answers each micro-batch of images without a gradient, as in
            distillation; its weights, its forward and the loss between the two are counted.
        num_samples, epochs: of the training set (default: ImageNet-1k) and the run, for hours.
        observes: where the model can't be traced, run real micro-batches on the device at hand.
        compare: fill in `levers` and `alternatives`; without, the plan takes half the time.
        sweeps: fill in `points`, the frontier of time against memory.
        say: called with a line before each trace.

    Raises:
        InputError: sizes that are none, a budget below the weights, an unknown device, or a model
            that can't be traced (`Untraceable`), with no such device at hand.

    >>> found = plan("resnet10t", img_size=64, global_batch_size=256, memory="1GiB", device="cpu",
    ...              num_classes=10, compare=False)
    >>> found.fits, found.micro_batch_size % 32, found.batch.global_batch_size
    (True, 0, 256)
    """
    check_pairs(embed, loss_fn, teacher)
    check_teacher(teacher, loss_fn, None if isinstance(model, nn.Module) else num_classes)
    machine = machine_of(
        device,
        memory=memory,
        host_memory=host_memory,
        world_size=world_size,
        zero=zero_of(zero_stage, offload, bucket_size=reduce_bucket_size, precision=precision),
    )
    trained = Trained(
        model=model,
        img_size=img_size,
        num_classes=num_classes,
        arguments=model_arguments(model, model_kwargs),
        optimizer=optimizer,
        make_batch=make_batch,
        loss_fn=loss_fn or classification_loss,
        embed=embed,
        teacher=teacher,
        clips=clip_grad_norm,
        precision=precision,
    )
    network = network_of(trained, machine.device)
    batch = batch_plan(
        network.model,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=machine.world_size,
        norm_batch_size=norm_batch_size,
        mix_pairs=mix_pairs,
    )
    pinned = Pinned(
        micro_batch_size=None if micro_batch_size is None else batch.largest_micro_batch(),
        memory_format=memory_format,
        checkpointing=activation_checkpointing,
        host_bytes=host_bytes_of(machine, batch, activation_offload, activation_checkpointing),
    )
    wanted = Wanted(num_samples, epochs, observes, compare, sweeps, activation_offload == "auto")
    return _made(trained, network, batch, machine, pinned, wanted, say)


def _made(
    trained: Trained,
    network: Network,
    batch: BatchPlan,
    machine: Machine,
    pinned: Pinned,
    wanted: Wanted,
    say: Callable[[str], object] | None,
) -> Plan:
    passes = passes_of(trained, batch, machine, pinned.micro_batch_size)
    search = partial(_search, trained, network, batch, say=say)
    if passes is None:
        return made(search(machine=machine, pinned=pinned), trained, wanted)
    # Passes run a level at a time without recompute, so other levers would be another update's.
    there = search(
        machine=without_host(machine, passes), pinned=replace(pinned, checkpointing="none")
    )
    found = made(there, trained, replace(wanted, compare=False, sweeps=False))
    return with_passes(found, passes, budget=machine.budget)


def _search(
    trained: Trained,
    network: Network,
    batch: BatchPlan,
    *,
    machine: Machine,
    pinned: Pinned,
    say: Callable[[str], object] | None,
) -> Search:
    estimator = Estimator(network, batch, machine.device, trained.precision)
    if say is not None:
        estimator.say = say
    if machine.zero is not None:
        estimator = estimator.under(machine.zero)
    weight_bytes = estimator.weight_bytes + estimator.teacher_bytes
    if weight_bytes > machine.budget:
        both = " and its teacher" if estimator.teacher_bytes else ""
        raise InputError(
            f"memory={machine.budget / GIB:.2f} GiB is below the weights of {trained.name}{both} "
            f"alone, {weight_bytes / GIB:.2f} GiB. Use more memory or a smaller model."
        )
    return Search(estimator, machine.budget, pinned)
