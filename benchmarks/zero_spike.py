"""Does DeepSpeed ZeRO-0/1/2/3 run lbaccel's exact update? Two CPU ranks against one process.

The number of micro-batches changes between updates (4, 2, 3), sizes are ragged, and a rank with
fewer real micro-batches runs fillers with weight zero. Start it from the repository root:

    DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(mktemp -d) \
        torchrun --nproc_per_node 2 benchmarks/zero_spike.py [--variants]

The reference is float64: one forward over all samples of the update, mean loss, SGD with momentum.
Exit status 1 if the weights of any stage are off by more than 1e-5. `--variants` only informs.
"""

import argparse
import sys
from contextlib import nullcontext

import deepspeed
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from deepspeed.utils import logger, safe_get_full_grad

# PLAN[update][rank] = sizes of the real micro-batches; the rank with fewer is filled up.
PLAN = [[[4, 4, 4, 2], [4, 3]], [[3], [4, 4]], [[4, 1, 2], []]]
TOLERANCE = 1e-5
LR, MOMENTUM, NAMES = 0.1, 0.9, ("weights", "move", "gradient")


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **size).to(dtype)


def make_data(update):
    """All samples of one update, in order of rank, the same on every rank."""
    g = torch.Generator().manual_seed(100 + update)
    n = sum(map(sum, PLAN[update]))
    return torch.randn(n, 3, 32, 32, generator=g), torch.randint(10, (n,), generator=g)


def micro_batches(update, rank, fill=True):
    """Yield (start, size, is_filler); with `fill` all ranks get the same number of them."""
    start, sizes = sum(map(sum, PLAN[update][:rank])), PLAN[update][rank]
    for size in sizes:
        yield start, size, False
        start += size
    for _ in range((max(map(len, PLAN[update])) if fill else 1) - len(sizes)):
        yield 0, 1, True  # the update's first sample, with weight zero


def run_reference(dtype=torch.float64, clip=0.0):
    """One process, no micro-batches: initial weights, then (weights, gradients) per update."""
    model = make_model(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    initial, history = [p.detach().clone() for p in model.parameters()], []
    for update in range(len(PLAN)):
        x, y = make_data(update)
        opt.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        history.append(([p.detach().clone() for p in model.parameters()], grads))
    return initial, history


def make_engine(stage, dtype=torch.float32, gas=1, clip=0.0, zero=(), accelerate=False, **config):
    """Plain `deepspeed.initialize`, or the same through `Accelerator.prepare`."""
    model = make_model(dtype)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    ds_config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 200_000,
            "stage3_param_persistence_threshold": 0,  # shard everything, small tensors too
            **dict(zero),
        },
        **config,
    }
    if not accelerate:
        return deepspeed.initialize(model=model, optimizer=opt, config=ds_config)[0], None
    AcceleratorState._reset_state()  # it allows one plugin per process
    kwargs = {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config), **kwargs)
    return accelerator.prepare(model, opt)[0], accelerator


def train(stage, boundary=True, scale_wrt_gas=False, fill=True, world=None, **kwargs):
    """The update under test; gives (weights, gradients) per update as `run_reference` does."""
    rank, world = dist.get_rank(), world or dist.get_world_size()
    engine, accelerator = make_engine(stage, **kwargs)
    dtype = kwargs.get("dtype", torch.float32)
    params = list(engine.module.parameters())
    history = []
    for update in range(len(PLAN)):
        x, y = make_data(update)
        todo, grads = list(micro_batches(update, rank, fill)), []
        for i, (start, size, is_filler) in enumerate(todo):
            last, part = i == len(todo) - 1, slice(start, start + size)
            weight = 0.0 if is_filler else size * world / len(x)
            if boundary and not accelerator:
                engine.set_gradient_accumulation_boundary(last)  # before forward and backward
            loss = weight * F.cross_entropy(engine(x[part].to(dtype)), y[part])
            if accelerator:  # sets the boundary and, at the boundary, steps
                accelerator.gradient_state._set_sync_gradients(last)
                accelerator.backward(loss, scale_wrt_gas=scale_wrt_gas)
            else:
                engine.backward(loss, scale_wrt_gas=scale_wrt_gas)
        if not accelerator:
            if boundary:  # a collective under ZeRO: every rank asks, for every parameter
                grads = [safe_get_full_grad(p).clone() for p in params]
            engine.step()  # once per update, never per micro-batch
        with deepspeed.zero.GatheredParameters(params) if stage == 3 else nullcontext():
            history.append(([p.detach().clone() for p in params], grads))
    engine.destroy()
    return history


def errors(initial, reference, history):
    """Relative errors (weights, move since the start, gradient) per update.

    Weights, gradient: largest max|a - b| / max|b| over tensors. Move: |a - b| / |b| over them all.
    """

    def worst(ours, theirs):
        pairs = zip(ours, theirs, strict=True)
        return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()

    def moved(weights):
        return torch.cat([(a - b).flatten() for a, b in zip(weights, initial, strict=True)])

    rows = []
    for (w, g), (rw, rg) in zip(history, reference, strict=True):
        move = ((moved(w) - moved(rw)).norm() / moved(rw).norm()).item()
        rows.append((worst(w, rw), move, worst(g, rg) if g else float("nan")))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--variants", action="store_true", help="also the informative rows")
    parser.add_argument("--no-filler", action="store_true", help="unequal micro-steps: may hang")
    args = parser.parse_args()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    logger.setLevel("ERROR")
    cases = [(f"ZeRO-{s}", {"stage": s, "fill": not args.no_filler}) for s in args.stages]
    required = len(cases)
    offload = {"offload_optimizer": {"device": "cpu"}}  # no effect on ZeRO-0
    variants = {
        "config gas 4": {"gas": 4},
        "SGD offload": {"zero": offload, "zero_force_ds_cpu_optimizer": False},
        "clipping 0.5": {"clip": 0.5},
        "accelerate, gas 4": {"gas": 4, "accelerate": True},
        "unmanaged": {"boundary": False, "managed_gradient_accumulation": False},
        "float64": {"dtype": torch.float64},
        "no boundary call": {"boundary": False},
        "WRONG: gas 4, scaled": {"gas": 4, "scale_wrt_gas": True},
        "WRONG: no * world": {"world": 1},
    }
    for s in args.stages if args.variants else []:
        cases += [(f"ZeRO-{s}, {name}", {"stage": s, **v}) for name, v in variants.items()]

    initial, reference = run_reference()
    show("max relative error of", [f"{n} {u + 1}" for n in NAMES for u in range(len(PLAN))])
    show("one process, float32", errors(initial, reference, run_reference(torch.float32)[1]))
    failed = False
    for number, (label, kwargs) in enumerate(cases):
        clip = kwargs.get("clip")
        target = run_reference(clip=clip)[1] if clip else reference
        try:
            rows = errors(initial, target, train(**kwargs))
            good = all(row[0] <= TOLERANCE for row in rows)  # false for nan
        except (AssertionError, RuntimeError, ValueError) as error:
            rows, good = [f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"], False
        failed |= number < required and not good
        show(label, rows)
    dist.destroy_process_group()
    sys.exit(failed)


def show(label, rows):
    if not isinstance(rows[0], str):
        rows = [f"{row[k]:.1e}" for k in range(len(NAMES)) for row in rows]
    if dist.get_rank() == 0:
        print("| " + " | ".join([f"{label:28}", *(f"{c:>10}" for c in rows)]) + " |", flush=True)


if __name__ == "__main__":
    main()
