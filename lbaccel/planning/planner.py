"""`lbaccel.plan`: does this batch fit, and what is the fastest way to fit it?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbaccel.batch.duration import IMAGENET
from lbaccel.batch.plan import BatchPlan, NormBatchSize
from lbaccel.errors import InputError, brief, check_whole
from lbaccel.network_arguments import network_arguments
from lbaccel.optim.defaults import default_base_lr
from lbaccel.optim.scaling import choose_rule, scale_lr
from lbaccel.planning.candidates import Checkpointing, MemoryFormat
from lbaccel.planning.cost.devices import GIB, Device
from lbaccel.planning.cost.update import (
    AUTOCAST,
    LossFn,
    MakeBatch,
    Network,
    Precision,
    classification_loss,
    taught_loss,
)
from lbaccel.planning.cost.zero_memory import BUCKET, Offload
from lbaccel.planning.estimate import Estimator, Untraceable
from lbaccel.planning.levers import levers
from lbaccel.planning.machine import (
    NOTHING_TO_OFFLOAD,
    Machine,
    host_bytes_of,
    is_at_hand,
    machine_of,
    zero_of,
)
from lbaccel.planning.network import Trained, image_shape, network_of, random_images
from lbaccel.planning.plan import Alternative, Plan
from lbaccel.planning.search import Choice, Pinned, Search
from lbaccel.planning.sweep import SweepPoint, sweep
from lbaccel.planning.whole_batch_norm import passes_of, with_passes, without_host
from lbaccel.update.embeddings import Embed, check_embed
from lbaccel.update.normalization import has_batch_norm

WORLD_SIZES = (1, 2, 4, 8)
NORM_BATCH_SIZE = 32
MOST_SAMPLES = 10**8  # of an update: a plan walks through its micro-batches one by one


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
    _check_embed(embed, loss_fn, teacher)
    _check_teacher(teacher, loss_fn, None if isinstance(model, nn.Module) else num_classes)
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
        arguments=_arguments(model, model_kwargs),
        optimizer=optimizer,
        make_batch=make_batch,
        loss_fn=loss_fn or classification_loss,
        embed=embed,
        teacher=teacher,
        clips=clip_grad_norm,
        precision=precision,
    )
    network = network_of(trained, machine.device)
    batch = _batch_plan(
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
        return _plan(search(machine=machine, pinned=pinned), trained, wanted)
    # Passes run a level at a time without recompute, so other levers would be another update's.
    there = search(
        machine=without_host(machine, passes), pinned=replace(pinned, checkpointing="none")
    )
    found = _plan(there, trained, replace(wanted, compare=False, sweeps=False))
    return with_passes(found, passes, budget=machine.budget)


def _check_size(global_batch_size: int) -> None:
    check_whole("global_batch_size", global_batch_size)
    if global_batch_size > MOST_SAMPLES:
        raise InputError(
            f"global_batch_size={brief(global_batch_size)} is above {MOST_SAMPLES:,}, the most "
            "that a plan walks through in micro-batches. Use a smaller one."
        )


def _arguments(
    model: str | nn.Module, model_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    if model_kwargs and not isinstance(model, str):
        raise InputError(
            "model_kwargs= are arguments of a model by name, and this one is built already. Leave "
            "them out."
        )
    return network_arguments(model_kwargs or {}, where="model_kwargs")


def _check_embed(embed: Embed | None, loss_fn: LossFn | None, teacher: nn.Module | None) -> None:
    if embed is None:
        return
    check_embed(embed)
    if loss_fn is None or teacher is not None:
        raise InputError(
            "embed= makes the rows of a loss on the whole batch, so it needs loss_fn=(model, rows) "
            "-> loss, and no teacher=. Give plan(..., embed=embed, loss_fn=loss_fn)."
        )


def _check_teacher(
    teacher: nn.Module | None, loss_fn: LossFn | None, num_classes: int | None
) -> None:
    if teacher is None:
        return
    if loss_fn is not None:
        raise InputError(
            "teacher= with loss_fn=: with a teacher the loss is that of distillation. Call the "
            "teacher in loss_fn, or leave loss_fn out."
        )
    outputs = getattr(teacher, "num_classes", num_classes)
    if num_classes is not None and outputs != num_classes:
        raise InputError(
            f"the teacher has {outputs} outputs and the network {num_classes}: both answer for the "
            f"same classes. Use num_classes={outputs} (--num-classes {outputs})."
        )


@dataclass(frozen=True)
class Wanted:
    """The contents of a plan beside the choice; `plan` describes each."""

    num_samples: int
    epochs: float
    observes: bool
    compare: bool
    sweeps: bool
    offloads: bool


def _batch_plan(
    model: nn.Module,
    *,
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
    norm_batch_size: NormBatchSize,
    mix_pairs: bool,
) -> BatchPlan:
    """The contract, with one group of samples as micro-batch where none is asked for."""
    _check_size(global_batch_size)
    if norm_batch_size is None and has_batch_norm(model):
        norm_batch_size = min(NORM_BATCH_SIZE, global_batch_size)
    unit = norm_batch_size if isinstance(norm_batch_size, int) else 2 if mix_pairs else 1
    return BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size or unit,
        world_size=world_size,
        norm_batch_size=norm_batch_size,
        mix_pairs=mix_pairs,
    )


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


def _chosen(search: Search, trained: Trained, *, observes: bool) -> tuple[Choice, list[str]]:
    """The search's choice, by real micro-batches where the model can't be traced, and notes."""
    estimator, optimizer = search.estimator, trained.optimizer
    try:
        return search.run(), []
    except Untraceable as error:
        traced_only = (
            not observes or trained.embed is not None
        )  # what is observed is no whole batch
        if traced_only or not isinstance(optimizer, str) or not is_at_hand(estimator.device):
            raise
        from lbaccel.planning.observe import observer  # it needs accelerate

        model = trained.built()
        estimator.observe = observer(
            estimator,
            model,
            trained.make_batch or random_images(*image_shape(model, trained.img_size)),
            loss_fn=_real_loss(trained),
            optimizer=optimizer,
            clip_grad_norm=trained.clips,
        )
        name = estimator.device.name
        return search.run(), [f"{error.reason} Real micro-batches on {name} measured this plan."]


def _real_loss(trained: Trained) -> LossFn:
    """The loss on real tensors: a teacher goes where the images are, under the same autocast."""
    if trained.teacher is None:
        return trained.loss_fn
    teacher, dtype = copy.deepcopy(trained.teacher).eval(), AUTOCAST.get(trained.precision)

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        there = teacher.to(images.device)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            return there(images)

    return taught_loss(answers)


def _plan(search: Search, trained: Trained, wanted: Wanted) -> Plan:
    choice, notes = _chosen(search, trained, observes=wanted.observes)
    estimator, candidate, estimate = search.estimator, choice.candidate, choice.estimate
    batch = replace(estimator.plan, micro_batch_size=candidate.micro_batch_size)
    how: Checkpointing = candidate.checkpointing
    rule, _ = choose_rule(trained.optimizer_name)
    num_updates = math.ceil(wanted.num_samples * wanted.epochs / batch.global_batch_size)
    # other devices and precisions can't be measured here
    compare = wanted.compare and estimator.observe is None
    return Plan(
        model=trained.name,
        device=estimator.device,
        budget_gib=search.budget / GIB,
        fits=choice.fits,
        batch=batch,
        activation_checkpointing=how if isinstance(how, str) else "segments",
        segments=() if isinstance(how, str) else how,
        units=len(estimator.units),
        memory_format=candidate.memory_format,
        precision=estimator.precision,
        optimizer=trained.optimizer_name,
        fused_optimizer=estimator.steps_fused,
        lr=scale_lr(
            default_base_lr(trained.optimizer_name, pretrained=False),
            base_batch_size=256,
            global_batch_size=batch.global_batch_size,
            rule=rule,
        ),
        predicted_peak_gib=estimate.peak / GIB,
        predicted_seconds_per_update=choice.seconds,
        breakdown={part: num_bytes / GIB for part, num_bytes in estimate.breakdown.items()},
        levers=levers(search, choice) if compare else (),
        alternatives=_alternatives(search, choice, num_updates) if compare else (),
        num_updates=num_updates,
        points=_points(search, choice) if wanted.sweeps else (),
        why="" if choice.fits else _why(search, choice),
        zero_stage=None if estimator.zero is None else estimator.zero.stage,
        offload="none" if estimator.zero is None else estimator.zero.offload,
        activation_offload=candidate.offload,
        host_gib=estimate.host_bytes / GIB,
        workspaces=estimator.workspaces(),
        notes=(*notes, *_notes(estimator, how, wanted)),
    )


def _notes(estimator: Estimator, how: Checkpointing, wanted: Wanted) -> Iterator[str]:
    if wanted.offloads and estimator.device.kind == "cpu":
        yield NOTHING_TO_OFFLOAD
    if how != "none" and not isinstance(how, str) and len(estimator.units) < 4:
        yield "the blocks of this network are no chain: whole stages are recomputed"
    if estimator.device.source != "calibrated" and estimator.observe is None:
        yield (
            f"seconds are from {estimator.device.source} rates of {estimator.device.name}: they "
            "compare plans and forecast nothing; `lbaccel calibrate` on the device measures it"
        )


def _why(search: Search, choice: Choice) -> str:
    parts = choice.estimate.breakdown
    whole = ("weights", "gradients", "optimizer", "context", "teacher")
    fixed = sum(parts.get(key, 0) for key in whole)
    size = choice.candidate.micro_batch_size
    what = f"{size} samples" if search.unit == 1 else f"one group of {size} samples"
    helps = "recompute and offload" if search.pinned.host_bytes else "recompute"
    return (
        f"{what} with all the {helps} that helps needs {choice.estimate.peak / GIB:.2f} GiB, "
        f"{fixed / GIB:.2f} of it whatever the batch; the budget is {search.budget / GIB:.2f} GiB"
    )


def _points(search: Search, choice: Choice) -> list[SweepPoint]:
    candidate, peak = choice.candidate, choice.estimate.peak / GIB
    kept = 1.0 if candidate.checkpointing == "none" else 0.0
    chosen = SweepPoint(candidate.micro_batch_size, kept, peak, choice.seconds, chosen=True)
    return sweep(search, candidate.memory_format, chosen)


def _alternatives(search: Search, choice: Choice, num_updates: int) -> list[Alternative]:
    """The same contract on 1, 2, 4 and 8 such devices, with the micro-batch chosen or less."""
    found: list[Alternative] = []
    estimator, candidate = search.estimator, choice.candidate
    for world in WORLD_SIZES:
        if estimator.plan.num_groups(estimator.plan.global_batch_size) < world:
            continue
        batch = replace(
            estimator.plan, world_size=world, micro_batch_size=candidate.micro_batch_size
        )
        size = batch.largest_micro_batch()
        other = Search(estimator.of_world(world), search.budget, search.pinned)
        there = other.alike(replace(candidate, micro_batch_size=size))
        hours = num_updates * there.seconds / 3600
        found.append(
            Alternative(
                world_size=world,
                micro_batch_size=there.candidate.micro_batch_size,
                peak_gib=there.estimate.peak / GIB,
                seconds_per_update=there.seconds,
                hours=hours,
                gpu_hours=world * hours,
            )
        )
    return found
