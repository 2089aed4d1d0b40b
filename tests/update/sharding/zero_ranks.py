"""Run by torchrun: lbaccel's update under DeepSpeed ZeRO against one process in float64.

Prints one JSON line on rank 0: {"world_size", "cells": {name: error}, "checks", "own"}.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import timm
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from deepspeed.utils import logger, safe_get_full_fp32_param
from timm.utils.model_ema import ModelEmaV3
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, RunFailed, UpdateLoader, apply_activation_checkpointing
from lbaccel.data.loader import Update
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.accumulation import accumulate, gather_rows
from lbaccel.update.normalization import convert_batch_norm

# Two ranks run 4, 2 and 3 micro-steps; in the first the last rank has one filler.
SIZES = (39, 20, 31)
MICRO, NORM = 6, 3
CLIP = 0.3  # below the norm of every update
CPU = torch.device("cpu")
OUT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@dataclass(frozen=True)
class Case:
    stage: int
    optimizer: str = "sgd"
    clip: float | None = None
    random: bool = False  # dropout, drop-path and activation checkpointing
    weights: bool = False  # the loss function returns weights of its own
    bf16: bool = False
    recompute: bool = False
    zero: dict[str, Any] = field(default_factory=dict)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    **{f"ZeRO-{s}, SGD": Case(s) for s in range(4)},
    **{f"ZeRO-{s}, AdamW": Case(s, "adamw") for s in range(4)},
    **{f"ZeRO-{s}, clipped": Case(s, clip=CLIP) for s in range(4)},
    **{f"ZeRO-{s}, keyed masks, recompute": Case(s, random=True) for s in range(4)},
    **{f"ZeRO-{s}, weights of its own": Case(s, weights=True, clip=CLIP) for s in range(4)},
    **{f"ZeRO-{s}, SGD offloaded": Case(s, zero=OFFLOAD, clip=CLIP) for s in (2, 3)},
    "ZeRO-3, parameters offloaded": Case(3, zero={**OFFLOAD, "offload_param": {"device": "cpu"}}),
    **{f"ZeRO-{s}, overlap": Case(s, zero={"overlap_comm": True}) for s in (1, 2, 3)},
    **{f"ZeRO-{s}, not contiguous": Case(s, zero={"contiguous_gradients": False}) for s in (1, 2)},
}


BF16 = {f"ZeRO-{s}, bf16": Case(s, bf16=True) for s in range(4)}
BF16["ZeRO-2, bf16, SGD offloaded"] = Case(2, bf16=True, zero=OFFLOAD)
BF16["ZeRO-3, bf16, recompute"] = Case(3, bf16=True, recompute=True)


MOVES = [
    *(("sgd", s, 3 - s) for s in range(4)),
    ("adamw", 1, 3),
    ("adamw", 3, 2),
    ("adamw", 2, 0),
]


def make_model(dtype, *, random=False):
    torch.manual_seed(0)
    rates = {"drop_rate": 0.3, "drop_path_rate": 0.3} if random else {}
    model = timm.create_model("lbaccel_tiny", num_classes=5, **rates).to(dtype)
    if random:
        apply_activation_checkpointing(model)
    return model.train()


def make_optimizer(model, name):
    """Two groups, as timm makes them. At an eps of 1e-8 Adam's step is a gradient's sign."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, eps=1e-3)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def make_samples(number):
    """All samples of an update, in order of position, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + number)
    images = torch.randn(SIZES[number], 3, 8, 8, generator=generator)
    return images, torch.randint(5, (SIZES[number],), generator=generator)


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])


def mean_loss(model, micro_batch):
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)


def weighted_loss(model, micro_batch):
    images, labels = micro_batch
    logits = model(images)
    weight = CLASS_WEIGHTS.to(logits.dtype)
    return F.cross_entropy(logits, labels, weight=weight), weight[labels].sum()


def reference(case):
    """(loss, norm, state) of each update of one process in float64; plain torch where it can be."""
    return train_reference(case.optimizer, case.clip, case.random, case.weights)[0]


def reference_optimizer(case):
    """Its optimizer after the last update."""
    return train_reference(case.optimizer, case.clip, case.random, case.weights)[1]


@functools.cache  # no stage changes it; nobody writes into what it returns
def train_reference(optimizer_name, clip, random, weights):
    model = make_model(torch.float64, random=random)
    optimizer = make_optimizer(model, optimizer_name)
    norm = convert_batch_norm(model, NORM) if random else None
    randomness = KeyedRandomness(0, CPU)
    history = []
    for number, count in enumerate(SIZES):
        images, labels = make_samples(number)
        images = images.double()
        optimizer.zero_grad()
        if norm is not None:  # masks are lbaccel's own: one process, one micro-batch
            norm.begin()
            whole = BatchPlan(global_batch_size=count, micro_batch_size=NORM, norm_batch_size=NORM)
            parts = [(m, cut(m, images, labels)) for m in whole.partition()]
            with randomness.update(number):
                sums = accumulate(
                    model, parts, mean_loss, num_samples=count, scopes=(norm, randomness)
                )
            norm.commit()
            loss = float(sums.loss) / count
        else:
            loss = ghost_batches_in_turn(model, images, labels, weights)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        history.append((loss, float(grad_norm), state))
    return history, optimizer


def ghost_batches_in_turn(model, images, labels, own_weights):
    weights = CLASS_WEIGHTS.double() if own_weights else torch.ones(5, dtype=torch.float64)
    total, loss = weights[labels].sum(), 0.0
    for rows in torch.arange(len(labels)).tensor_split(-(-len(labels) // NORM)):
        part = F.cross_entropy(model(images[rows]), labels[rows], weights, reduction="sum") / total
        part.backward()
        loss += part.item()
    return loss


def cut(micro_batch, images, labels):
    part = slice(micro_batch.start, micro_batch.start + micro_batch.num_samples)
    return images[part], labels[part]


def make_accelerator(case):
    AcceleratorState._reset_state()  # it allows one plugin per process
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": case.stage,
            "reduce_bucket_size": 200,  # several buckets
            "stage3_prefetch_bucket_size": 200,
            "stage3_param_persistence_threshold": 0,  # small tensors are sharded too
            **case.zero,
        },
    }
    return Accelerator(
        mixed_precision="bf16" if case.bf16 else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def make_plan(accelerator, count=SIZES[0]):
    return BatchPlan(
        global_batch_size=count,
        micro_batch_size=MICRO,
        world_size=accelerator.num_processes,
        norm_batch_size=NORM,
    )


def updates(accelerator):
    for number, count in enumerate(SIZES):
        plan = make_plan(accelerator, count)
        samples = make_samples(number)
        micro_batches = plan.partition(accelerator.process_index)
        yield Update(number, count, [(m, cut(m, *samples)) for m in micro_batches])


def whole_state(large_batch):
    with large_batch.whole_model() as network:
        return {k: v.detach().clone() for k, v in network.state_dict().items()}


def errors(found, truth):
    """Largest max|a - b| / max|b| of weights and buffers, loss and norm."""
    (loss, grad_norm, state), (true_loss, true_norm, true_state) = found, truth
    pairs = [(state[k].double(), v.double()) for k, v in true_state.items()]
    worst = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return max(*worst, abs(loss / true_loss - 1), abs(grad_norm / true_norm - 1))


def cell(case):
    accelerator = make_accelerator(case)
    plan = make_plan(accelerator)
    model = make_model(torch.float32, random=case.random)
    optimizer = make_optimizer(model, case.optimizer)
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=case.clip)
    engine, _, loader = large_batch.prepare(model, optimizer, updates(accelerator))
    assert engine.basic_optimizer is optimizer
    assert engine.zero_optimization_stage() == case.stage
    assert dist.get_world_size() == accelerator.num_processes == plan.world_size
    loss_fn = weighted_loss if case.weights else mean_loss
    worst = 0.0
    assert case.clip is None or all(norm > 1.1 * case.clip for _, norm, _ in reference(case))
    for update, truth in zip(loader, reference(case), strict=True):
        result = large_batch.update(update, loss_fn)
        assert result.applied and result.num_samples == update.num_samples
        worst = max(worst, errors((result.loss, result.grad_norm, whole_state(large_batch)), truth))
    assert large_batch.samples_seen == sum(SIZES)
    engine.destroy()
    everywhere = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return everywhere.item()


def one_process_in_bf16(plan, samples, ranks, *, steps, recompute=False):
    """Autocast by hand over the micro-batches of `ranks` in turn: (loss, model, gradients seen)."""
    model = make_model(torch.float32)
    if recompute:
        apply_activation_checkpointing(model)
    norm, seen = convert_batch_norm(model, NORM), []

    def loss_fn(model, micro_batch):
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        images, labels = micro_batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    parts = [(m, cut(m, *samples)) for rank in ranks for m in plan.partition(rank)]
    norm.begin()
    optimizer = make_optimizer(model, "sgd")
    sums = accumulate(model, parts, loss_fn, num_samples=plan.global_batch_size, scopes=(norm,))
    norm.commit()
    if steps:
        optimizer.step()
    return float(sums.loss) / plan.global_batch_size, model.state_dict(), seen


def apart(found, truth):
    """|a - b| / |b| of two moves since the start, over all weights; and of each buffer."""
    start = make_model(torch.float32)
    weights = {name for name, _ in start.named_parameters()}
    start = start.state_dict()
    a, b = (
        torch.cat([(s[k].double() - start[k].double()).flatten() for k in sorted(weights)])
        for s in (found, truth)
    )
    buffers = [(found[k].double(), truth[k].double()) for k in start if k not in weights]
    worst = [float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in buffers]
    return float((a - b).norm() / b.norm()), max(worst)


def bf16_cell(case):
    """Each update, from the same state, against one process: the largest error.

    Before anything is reduced, the gradient of a rank's own micro-batches is that of one process
    to the bit (under ZeRO-3 each micro-step is reduced).
    """
    worst = 0.0
    for number, count in enumerate(SIZES):
        accelerator = make_accelerator(case)
        rank, world = accelerator.process_index, accelerator.num_processes
        plan, samples = make_plan(accelerator, count), make_samples(number)
        model, seen = make_model(torch.float32), []
        if case.recompute:
            apply_activation_checkpointing(model)
        large_batch = LargeBatch(accelerator, plan)
        ema = None if case.stage == 3 else ModelEmaV3(model, decay=0.25)
        engine, _, _ = large_batch.prepare(model, make_optimizer(model, "sgd"), (), ema=ema)
        assert accelerator.mixed_precision == "bf16" and not engine.bfloat16_enabled()

        def loss_fn(model, micro_batch, seen=seen, stage=case.stage):
            grads = () if stage == 3 else [p.grad for p in model.parameters()]
            if torch.is_grad_enabled():  # not the samples on which masks are learned
                seen.append([None if g is None else g.clone() for g in grads])
            images, labels = micro_batch
            logits = model(images)
            assert logits.dtype == torch.float32
            return F.cross_entropy(logits, labels)

        parts = [(m, cut(m, *samples)) for m in plan.partition(rank)]
        result = large_batch.update(Update(number, count, parts), loss_fn)
        with large_batch.whole_model() as network:
            state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
        options = {"recompute": case.recompute}
        loss, truth, _ = one_process_in_bf16(plan, samples, range(world), steps=True, **options)
        if ema is not None:  # of the float32 weights
            start = make_model(torch.float32).state_dict()
            for name, average in ema.module.named_parameters():
                wanted = 0.25 * start[name].double() + 0.75 * state[name].double()
                assert torch.allclose(average.double(), wanted, rtol=1e-6, atol=1e-7), name
        worst = max(worst, *apart(state, truth), abs(result.loss / loss - 1))
        if case.stage < 3:
            *_, alone = one_process_in_bf16(plan, samples, [rank], steps=False)
            assert len(seen) == len(alone) == plan.num_micro_steps(count)
            for ours, theirs in zip(seen[1:], alone[1:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        engine.destroy()
    everywhere = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return everywhere.item()


def deepspeeds_own_bf16(stage):
    """What `bf16_cell` bounds, of the naive run: weights (and buffers) cast by DeepSpeed.

    DeepSpeed 0.19.8 leaves buffers float32 unless told; torch's batch norm on a CPU then refuses
    bf16 weights beside them.
    """
    accelerator = make_accelerator(Case(stage, bf16=True))
    rank, world = accelerator.process_index, accelerator.num_processes
    plan, samples = make_plan(accelerator), make_samples(0)
    model = make_model(torch.float32)
    norm = convert_batch_norm(model, NORM)
    config: Any = accelerator.deepspeed_plugin.deepspeed_config
    config |= {"train_micro_batch_size_per_gpu": MICRO, "gradient_clipping": 0.0}
    config["data_types"] = {"buffer_dtype": "bf16"}
    engine, _ = accelerator.prepare(model, make_optimizer(model, "sgd"))
    parts = [(m, cut(m, *samples)) for m in plan.partition(rank)]
    norm.begin()
    for number, (micro_batch, (images, labels)) in enumerate(parts):
        engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
        with norm.forward(micro_batch):
            loss = F.cross_entropy(engine(images.bfloat16()).float(), labels)
            share = 0 if micro_batch.is_filler else micro_batch.num_samples / plan.global_batch_size
            engine.backward(loss * share * world, scale_wrt_gas=False)
    engine.step()
    norm.commit(gather_rows)
    found = {k: safe_get_full_fp32_param(p).clone() for k, p in engine.module.named_parameters()}
    found |= {k: v.clone() for k, v in engine.module.named_buffers()}
    _, truth, _ = one_process_in_bf16(plan, samples, range(world), steps=True)
    engine.destroy()
    return apart(found, truth)


def moved(name, before, after):
    """Two updates under one stage, its state taken into another, and the third: the error.

    Between them lies a state as one process has it: torch's own optimizer takes it, and its
    tensors are those of the reference.
    """
    case = Case(before, name)
    truth = reference(case)
    states = []
    for stage, numbers in ((before, (0, 1)), (after, (2,))):
        accelerator = make_accelerator(Case(stage))
        model = make_model(torch.float32)
        if states:
            model.load_state_dict(states[0][0])
        optimizer = make_optimizer(model, name)
        large_batch = LargeBatch(accelerator, make_plan(accelerator))
        engine, _, loader = large_batch.prepare(model, optimizer, updates(accelerator))
        if states:
            large_batch.optimizer_state().load_state_dict(states[0][1])
            again = large_batch.optimizer_state().state_dict()
            same(again, states[0][1])
        for update in loader:
            if update.index in numbers:
                result = large_batch.update(update, mean_loss)
        states.append(
            (whole_state(large_batch), copy.deepcopy(large_batch.optimizer_state().state_dict()))
        )
        engine.destroy()
    model = make_model(torch.float64)
    plain = make_optimizer(model, name)
    plain.load_state_dict(states[1][1])  # of a plain run, then
    worst = errors((result.loss, result.grad_norm, states[1][0]), truth[2])
    true_optimizer = reference_optimizer(case)
    for p, q in zip(ordered(plain), ordered(true_optimizer), strict=True):
        assert plain.state[p].keys() == true_optimizer.state[q].keys()
        for key, value in true_optimizer.state[q].items():
            off = (plain.state[p][key].double() - value.double()).abs().max()
            worst = max(worst, float(off / value.double().abs().max()))
    everywhere = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return everywhere.item()


def ordered(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def same(found, saved):
    assert found["state"].keys() == saved["state"].keys()
    for number, entry in saved["state"].items():
        assert entry.keys() == found["state"][number].keys()
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found["state"][number][key]))
    assert found["param_groups"] == saved["param_groups"]


class Backward(torch.autograd.Function):
    """The identity, whose backward raises; without an error, its gradient is nan."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.error is None:
            return grad * float("nan"), None
        raise ctx.error


def recovery(case, phase, make_error=lambda: None):
    """The last rank fails once, in its second micro-step: what all ranks say, and the outcome.

    Returns, of each rank: what was raised, whether all was as before, retries and micro-batch of
    the next update, and the error of its weights against a run without faults.
    """
    accelerator = make_accelerator(case)
    rank, world = accelerator.process_index, accelerator.num_processes
    images, labels = make_samples(0)
    states, said = [], None
    for faulty in (False, True):
        if faulty:
            accelerator = make_accelerator(case)
        plan = make_plan(accelerator)
        model = make_model(torch.float32)
        optimizer = make_optimizer(model, "sgd")
        large_batch = LargeBatch(accelerator, plan)
        loader = UpdateLoader(TensorDataset(images, labels), plan, rank=rank)
        engine, optimizer, loader = large_batch.prepare(model, optimizer, loader)
        calls = [0]

        def loss_fn(model, micro_batch, faulty=faulty, calls=calls):
            calls[0] += torch.is_grad_enabled()  # not the samples on which masks are learned
            loss = mean_loss(model, micro_batch)
            if not (faulty and rank == world - 1 and calls[0] == 2):
                return loss
            if phase == "nan":
                return loss * float("nan")
            if phase == "forward":
                raise make_error()
            return Backward.apply(loss, make_error())

        if faulty:
            before = whole_state(large_batch)
            raised, result = "nothing", None
            (update,) = loader
            try:
                result = large_batch.update(update, loss_fn)
            except (RunFailed, ZeroDivisionError) as error:
                raised = f"{type(error).__name__}: {error}"
            now = whole_state(large_batch)
            kept = all(torch.equal(now[k], v) for k, v in before.items())
            if result is None:
                assert large_batch.num_updates == 0
                loader = UpdateLoader(TensorDataset(images, labels), plan, rank=rank)
                (update,) = loader
                result = large_batch.update(update, loss_fn)
            said = (raised, kept, result.num_retries, result.micro_batch_size)
        else:
            (update,) = loader
            large_batch.update(update, loss_fn)
        states.append(whole_state(large_batch))
        engine.destroy()
    plain, recovered = states
    off = max(
        float((recovered[k].double() - v.double()).abs().max() / v.double().abs().max())
        for k, v in plain.items()
    )
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (*said, off))
    return everyone


def lost_rank():
    """Under ZeRO-3 the last rank runs out of memory; this process ends by the error."""
    accelerator = make_accelerator(Case(3))
    model = make_model(torch.float32)
    large_batch = LargeBatch(accelerator, make_plan(accelerator))
    _, _, loader = large_batch.prepare(model, make_optimizer(model, "sgd"), updates(accelerator))
    last = accelerator.process_index == accelerator.num_processes - 1

    def loss_fn(model, micro_batch):
        if last:
            raise torch.OutOfMemoryError(OUT)
        return mean_loss(model, micro_batch)

    try:
        large_batch.update(next(loader), loss_fn)
    except RunFailed as error:
        print(f"RANK {accelerator.process_index} {type(error).__name__}: {error}", flush=True)
        raise


def results(what):
    """What this rank finds of the cells named, or of all: the same on each."""
    logger.setLevel("ERROR")
    everything = {**CASES, **BF16}
    names = everything if what == "all" else what.split(";")
    cells = {
        name: (bf16_cell if everything[name].bf16 else cell)(everything[name]) for name in names
    }
    if what == "all":
        for name, before, after in MOVES:
            cells[f"{name}, ZeRO-{before} to ZeRO-{after}"] = moved(name, before, after)
    own = {s: deepspeeds_own_bf16(s) for s in (1, 2)} if what == "all" else {}
    checks = {}
    if what == "all" and dist.get_world_size() == 2:
        for stage in (0, 1, 2):
            for phase in ("forward", "backward"):
                checks[f"memory, ZeRO-{stage}, {phase}"] = recovery(
                    Case(stage), phase, lambda: torch.OutOfMemoryError(OUT)
                )
            checks[f"error, ZeRO-{stage}"] = recovery(
                Case(stage), "backward", lambda: ZeroDivisionError("as it happens")
            )
        checks["memory, ZeRO-2, offloaded"] = recovery(
            Case(2, zero=OFFLOAD), "backward", lambda: torch.OutOfMemoryError(OUT)
        )
        checks["error, ZeRO-2, offloaded"] = recovery(
            Case(2, zero=OFFLOAD), "backward", lambda: ZeroDivisionError("as it happens")
        )
        for stage in range(4):
            checks[f"nan loss, ZeRO-{stage}"] = recovery(Case(stage), "nan")
            checks[f"nan gradient, ZeRO-{stage}"] = recovery(Case(stage), "nan gradient")
    return {"world_size": dist.get_world_size(), "cells": cells, "checks": checks, "own": own}


def main():
    torch.set_num_threads(1)
    if sys.argv[1] == "lost rank":
        return lost_rank()
    found = results(sys.argv[1])
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    main()
